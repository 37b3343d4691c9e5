"""Alignment of bases that do not correspond: goldens, planted permutations, and two CLIPs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.contrib import gromov
from tests.anchors import models
from tests.conftest import low_rank

pytest.importorskip("ot", reason="the extra gromov (POT) is not installed")

GOLDEN = load_file(Path(__file__).parents[1] / "goldens" / "federated" / "gromov.safetensors")
RANK = 6


def test_distances() -> None:
    for one, wanted in (("D_A", "C_A"), ("D_B", "C_B")):
        torch.testing.assert_close(gromov.neuron_distances(GOLDEN[one], RANK), GOLDEN[wanted])


def test_the_planted_permutation_is_found() -> None:
    plan = gromov.gromov_plan(GOLDEN["C_A"], GOLDEN["C_B"])
    torch.testing.assert_close(plan.coupling, GOLDEN["plan"], atol=1e-9, rtol=0)
    assert plan.distance == pytest.approx(0, abs=1e-10)
    assert torch.equal(plan.transport.argmax(0), GOLDEN["perm"].long())


def test_a_small_problem_is_solved_as_well_as_by_brute_force() -> None:
    """The golden's loss is that of one start; ours is at most that, and its value is the
    definition's.
    """
    C, D = GOLDEN["small.C1"], GOLDEN["small.C2"]
    plan = gromov.gromov_plan(C, D)
    assert plan.distance <= float(GOLDEN["small.gw"]) + 1e-9
    P, total = plan.coupling, 0.0
    for i in range(5):
        for j in range(5):
            total += float(((C[i][:, None] - D[j][None]) ** 2 * P).sum() * P[i, j])
    assert plan.distance == pytest.approx(total)


def test_a_constant_metric_gives_the_uniform_plan() -> None:
    """Orthonormal columns are all sqrt 2 apart: nothing is to be found, whatever the models are."""
    U = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64))[0]
    C, D = (gromov.neuron_distances(frame.T) for frame in (U, V))
    torch.testing.assert_close(C, D)
    plan = gromov.gromov_plan(C, D)
    assert plan.distance == pytest.approx(0, abs=1e-12)
    uniform = torch.full((5, 5), 1 / 25, dtype=torch.float64)
    ot = pytest.importorskip("ot")
    found = ot.gromov.entropic_gromov_wasserstein(C.numpy(), D.numpy(), epsilon=0.05)
    torch.testing.assert_close(torch.as_tensor(found), uniform, atol=1e-14, rtol=0)


def test_components_by_their_singular_values_know_the_spectrum_alone() -> None:
    """Why neurons and not components: (s_i u_i) are the same distances for unrelated U."""
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    frames = [torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64))[0] for _ in range(2)]
    C, D = (gromov.neuron_distances((frame * sigma).T) for frame in frames)
    torch.testing.assert_close(C, D)
    rows = [gromov.neuron_distances(frame * sigma) for frame in frames]
    assert not torch.allclose(*rows, atol=0.1)


def layer(*updates: Tensor) -> sm.Layer:
    return sm.Layer("l", tuple(sm.Dense(update) for update in updates))


def test_the_published_formula() -> None:
    """The golden keeps the inputs: T_L D_B, its part inside the subspace of D_A, and the sum."""
    method = gromov.GromovMerge(rank=RANK, inputs="keep")
    found = method(layer(GOLDEN["D_A"], GOLDEN["D_B"])).dense()
    torch.testing.assert_close(found, GOLDEN["merged"])
    parts = GOLDEN["tau_proj"] + GOLDEN["tau_orth"]
    torch.testing.assert_close(parts, GOLDEN["aligned"])
    average = gromov.GromovMerge(rank=RANK, inputs="keep", average=True)
    found = average(layer(GOLDEN["D_A"], GOLDEN["D_B"])).dense()
    torch.testing.assert_close(found, (GOLDEN["D_A"] + GOLDEN["aligned"]) / 2)


def test_signatures() -> None:
    """The golden has the published scale, 1: its p is one-hot."""
    sigma = torch.linalg.svdvals(GOLDEN["D_A"])[:RANK]
    d = float(GOLDEN["gw"][0])
    psi = gromov.signature(sigma, d, scale=1.0)
    torch.testing.assert_close(psi, GOLDEN["psi_A"], atol=1e-9, rtol=1e-9)
    assert gromov.tfi(psi) == pytest.approx(float(GOLDEN["tfi"][0]), rel=1e-3)
    assert gromov.tos(psi, GOLDEN["psi_B"], d) == pytest.approx(float(GOLDEN["tos"][0]))
    p = torch.softmax(sigma / sigma[0], 0)
    wanted = [float((p * sigma).sum()), float(-(p * p.log()).sum()), d]
    assert gromov.signature(sigma, d).tolist() == pytest.approx(wanted)


def test_what_corresponds_already_stays() -> None:
    """D_B = D_A: the plan is the identity, lam 1/2, and the result D + D / 2."""
    D = GOLDEN["D_A"]
    torch.testing.assert_close(gromov.dgsm_tefm()(layer(D, D)).dense(), 1.5 * D)
    torch.testing.assert_close(gromov.dgsm_tefm(average=True)(layer(D, D)).dense(), D)
    torch.testing.assert_close(gromov.dgsm_tefm()(layer(D)).dense(), D)


def test_permuted_neurons_and_inputs_are_put_back() -> None:
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(15, 11, generator=generator, dtype=torch.float64)
    rows, columns = torch.randperm(15, generator=generator), torch.randperm(11, generator=generator)
    other = D[rows][:, columns]
    found = gromov.dgsm_tefm(average=True)(layer(D, other)).dense()
    torch.testing.assert_close(found, D)


def permuted(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """The same function with other neurons: streams, MLPs, and the coordinates of every head.

    Returns it with layer -> (rows, columns): weight B = weight A[rows][:, columns].
    """
    generator = torch.Generator().manual_seed(9)
    other = copy.deepcopy(model)
    places: dict[str, tuple[Tensor, Tensor]] = {}
    tensors = dict(other.named_parameters())
    for tower in ("text_model", "vision_model"):
        layers = [name for name in tensors if name.startswith(tower) and ".layers." in name]
        parent = layers[0].partition(".layers.")[0]
        width = getattr(other, tower).config.hidden_size
        heads = getattr(other, tower).config.num_attention_heads
        stream = torch.randperm(width, generator=generator)
        count = len({name.split(".layers.")[1].split(".")[0] for name in layers})
        for block in range(count):
            prefix = f"{parent}.layers.{block}"
            inner = len(tensors[f"{prefix}.mlp.fc1.weight"])
            hidden = torch.randperm(inner, generator=generator)
            size = width // heads
            within = [
                torch.cat(
                    [k * size + torch.randperm(size, generator=generator) for k in range(heads)]
                )
                for _ in range(2)
            ]
            for leaf, rows, columns in (
                ("self_attn.q_proj", within[0], stream),
                ("self_attn.k_proj", within[0], stream),
                ("self_attn.v_proj", within[1], stream),
                ("self_attn.out_proj", stream, within[1]),
                ("mlp.fc1", hidden, stream),
                ("mlp.fc2", stream, hidden),
            ):
                places[f"{prefix}.{leaf}"] = (rows, columns)
        with torch.no_grad():
            for name, tensor in tensors.items():
                owner, _, last = name.rpartition(".")
                if owner in places and name.startswith(tower):
                    rows, columns = places[owner]
                    tensor.copy_(tensor[rows][:, columns] if last == "weight" else tensor[rows])
                elif name.startswith(tower) and tensor.shape[-1] == width and "patch" not in name:
                    tensor.copy_(tensor[..., stream])
                elif name.startswith(f"{tower}.embeddings.patch"):
                    tensor.copy_(tensor[stream])
            projection = tensors[
                "visual_projection.weight" if tower[0] == "v" else "text_projection.weight"
            ]
            projection.copy_(projection[:, stream])
    return other, places


def test_two_clips_whose_neurons_are_permuted() -> None:
    """Equal functions: what was trained on the one, aligned, merges as if it had been trained on
    the other.
    """
    base = models.clip()
    other, places = permuted(base)
    (batch,) = models.pairs((3,))
    with torch.no_grad():
        torch.testing.assert_close(
            other(**batch).logits_per_image, base(**batch).logits_per_image, atol=1e-4, rtol=1e-4
        )
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    (one, two), _ = models.adapters(base, [targets, targets])
    tensors, ranks = {}, {}
    for name in two.modules:
        rows, columns = next(p for key, p in places.items() if same(key, name))
        update = two.update(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.A[:, columns]
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.B[rows]
        ranks[name] = update.rank
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(ranks)}
    foreign = sm.Adapter.from_state_dict(config, tensors, label="two")

    heads = {"text_model": base.text_model.config.num_attention_heads}
    heads["vision_model"] = base.vision_model.config.num_attention_heads
    align = gromov.GromovAlign.between(base, other, foreign.modules, gromov.transformer(heads))
    assert max(align.distances.values()) < 1e-9
    assert align.kept(foreign) == pytest.approx(1)
    wanted = dict(sm.merge([one, two], method=sm.mean(), progress=False).updates())
    found = dict(sm.merge([one, align(foreign)], method=sm.mean(), progress=False).updates())
    unaligned = dict(sm.merge([one, foreign], method=sm.mean(), progress=False).updates())
    for name, update in wanted.items():
        torch.testing.assert_close(found[name].dense(), update.dense(), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(unaligned[name].dense(), update.dense(), atol=1e-4)


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_llama(keys: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **models.TEXT, max_position_embeddings=32, pad_token_id=0, num_key_value_heads=keys
    )
    return models.louder(LlamaForCausalLM(config).eval())


def test_two_llamas_whose_neurons_are_permuted() -> None:
    """Rotary positions: queries and keys stay, streams, MLPs and values are found."""
    generator, base = torch.Generator().manual_seed(4), tiny_llama()
    other, places = copy.deepcopy(base), dict[str, tuple[Tensor, Tensor]]()
    stream = torch.randperm(16, generator=generator)
    for block in range(2):
        prefix = f"model.layers.{block}"
        hidden = torch.randperm(24, generator=generator)
        values = torch.cat([8 * k + torch.randperm(8, generator=generator) for k in range(2)])
        for leaf in LLAMA:
            where = "mlp" if leaf in LLAMA[4:] else "self_attn"
            inner = torch.arange(16) if leaf in LLAMA[:2] else values
            inner = hidden if where == "mlp" else inner
            sides = (inner, stream) if leaf not in ("o_proj", "down_proj") else (stream, inner)
            places[f"{prefix}.{where}.{leaf}"] = sides
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            rows, columns = places.get(name.rpartition(".")[0], (None, stream))
            moved = tensor[..., columns]
            tensor.copy_(moved if rows is None else moved[rows])
    batch = {"input_ids": torch.tensor([[1, 5, 9, 7]])}
    with torch.no_grad():
        torch.testing.assert_close(
            other(**batch).logits, base(**batch).logits, atol=1e-4, rtol=1e-4
        )
    adapter = models.adapters(base, [list(LLAMA)])[0][0]
    with pytest.raises(sm.MethodError, match=r"feeds rotary positions .*rotary=True"):
        gromov.GromovAlign.between(base, other, adapter.modules, gromov.transformer(2))
    wiring = gromov.transformer(2, rotary=True)
    align = gromov.GromovAlign.between(base, other, adapter.modules, wiring)
    for name, update in ((name, adapter.update(name)) for name in adapter.modules):
        rows, columns = places[name]
        foreign = sm.Dense(update.dense()[rows][:, columns])
        torch.testing.assert_close(align.update(name, foreign).dense(), update.dense())


def test_grouped_keys_are_refused_by_name() -> None:
    base = tiny_llama(keys=1)
    adapter = models.adapters(base, [["q_proj", "o_proj"]])[0][0]
    wiring = gromov.transformer(2, rotary=True)
    message = r"layers\.0\.self_attn' has grouped keys \(8 rows for 16"
    with pytest.raises(sm.MethodError, match=message):
        gromov.GromovAlign.between(base, base, adapter.modules, wiring)
    mlp = models.adapters(base, [["up_proj", "down_proj"]])[0][0]
    align = gromov.GromovAlign.between(base, base, mlp.modules, gromov.transformer(2))
    assert align.kept(mlp) == pytest.approx(1)


def test_a_wiring_that_does_not_fit() -> None:
    base = models.clip()
    adapter = models.adapters(base, [["fc1"]])[0][0]
    with pytest.raises(sm.MethodError, match="the wiring does not fit"):
        gromov.GromovAlign.between(
            base, base, adapter.modules, lambda _: (gromov.Space("all"), gromov.Space("all"))
        )


def test_laws() -> None:
    """What `tests/methods/test_laws.py` asks of methods without extras; the order of adapters
    counts here: the first one is the reference.
    """
    D, E = (low_rank((9, 8), rank, rank).dense() for rank in (3, 2))
    for method in (gromov.dgsm_tefm(), gromov.dgsm_tefm(average=True), gromov.dgsm_tefm(rank=2)):
        whole = method(layer(D, E)).dense()
        for factor in (-1.0, 1e3, 1e-3):
            scaled = method(layer(factor * D, factor * E)).dense()
            torch.testing.assert_close(scaled, factor * whole, atol=1e-9 * abs(factor), rtol=1e-7)
        torch.testing.assert_close(method(layer(D)).dense(), D)
        members = sm.Layer("l", [sm.Dense(D), sm.Dense(E), sm.Dense(D)], weights=(1.0, 1.0, 0.0))
        torch.testing.assert_close(method(members).dense(), whole)
        left = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3)
        first = low_rank((9, 8), 3, 3)
        split = sm.LowRank(first.B @ left, torch.linalg.solve(left, first.A))
        mixed = sm.Layer("l", [split, sm.Dense(E)])
        torch.testing.assert_close(method(mixed).dense(), whole)


def same(one: str, other: str) -> bool:
    """Names of transformers 4 and 5."""
    return one.replace(".encoder.", ".") == other.replace(".encoder.", ".")


def test_what_cannot_be_aligned() -> None:
    with pytest.raises(sm.MethodError, match="all equal"):
        gromov.neuron_distances(torch.ones(4, 3))
    with pytest.raises(sm.MethodError, match="wiring of your own"):
        gromov.transformer(2)("visual_projection")
    with pytest.raises(sm.MethodError, match="0 entries"):
        gromov.transformer({"text": 2})("vision.layers.0.q_proj")
    with pytest.raises(sm.MethodError, match="rank is at least 1"):
        gromov.dgsm_tefm(rank=0)
