"""Routed composition: equal to merges where a router is constant, to PEFT's Arrow, and to what was
written.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import ArrowConfig, create_arrow_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.io.routed import FACTORS, ROUTED, ROUTER
from tests.models import IDS, Zoo, copied, files, load, products, quietly, same, save_lora
from tests.versions import needs_peft_21

LINEAR = ("q", "enc.q", "layers.1.v", "gpt", "narrow")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Three adapters of different ranks; the last one lacks a layer."""
    return {
        "a": save_lora(tmp_path / "a", 1, r=2, targets=LINEAR),
        "b": save_lora(tmp_path / "b", 2, r=4, alpha=4, targets=LINEAR),
        "c": save_lora(tmp_path / "c", 3, r=3, targets=LINEAR[:-1]),
    }


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def routed_outputs(mixed: sm.Routed) -> Tensor:
    model = Zoo()
    with mixed.attach(model):
        return outputs(model)


def merged_outputs(merged: sm.Merged) -> Tensor:
    model = Zoo()
    merged.apply_to(model)
    return outputs(model)


def test_uniform_is_the_mean(folders: dict[str, Path]) -> None:
    mean = merged_outputs(sm.merge(folders, method=sm.mean()))
    assert torch.allclose(routed_outputs(sm.routed(folders)), mean, atol=1e-6)
    assert not torch.allclose(mean, outputs(Zoo()), atol=1e-2)


@pytest.mark.parametrize("label", ["a", "b", "c"])
def test_all_weight_on_one_is_that_adapter(folders: dict[str, Path], label: str) -> None:
    mixed = sm.routed(folders, router=sm.FixedRouter({label: 1.0}))
    assert torch.allclose(routed_outputs(mixed), outputs(load(folders[label])), atol=1e-6)


def test_a_learned_router_begins_as_the_mean(folders: dict[str, Path]) -> None:
    router = sm.LearnedRouter(steps=0)
    mixed = sm.routed(
        folders, [IDS], Zoo(), router=router, loss=lambda model, ids: model(ids).sum()
    )
    assert torch.allclose(routed_outputs(mixed), routed_outputs(sm.routed(folders)), atol=1e-6)


def test_folding_gives_a_plain_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = {"a": 0.5, "c": -1.0}
    mixed = sm.routed(folders, router="arrow")
    mixed.fold(weights).save_pretrained(tmp_path / "folded")
    deltas = {
        label: products(folder, {"a": 4, "b": 1, "c": 8 / 3}[label])
        for label, folder in folders.items()
    }
    for name, got in products(tmp_path / "folded", 1).items():
        wanted = sum(weights.get(k, 0) * deltas[k][name] for k in deltas if name in deltas[k])
        assert torch.allclose(got, torch.as_tensor(wanted), atol=1e-6), name
    fixed = sm.routed(folders, router=sm.FixedRouter(weights))
    assert torch.allclose(outputs(load(tmp_path / "folded")), routed_outputs(fixed), atol=1e-5)
    fixed.fold().save_pretrained(tmp_path / "own")
    assert torch.allclose(outputs(load(tmp_path / "own")), routed_outputs(fixed), atol=1e-5)


def test_folding_with_weights_per_layer(folders: dict[str, Path]) -> None:
    mixed = sm.routed(folders, router="arrow")
    rows = {name: {"a": 0.1 * k, "b": 1 - 0.1 * k} for k, name in enumerate(mixed.states)}
    for name, got in mixed.fold(rows).updates():
        a, b = (sm.Adapter.load(folders[label]).update(name).dense() for label in "ab")
        assert torch.allclose(got.dense(), rows[name]["a"] * a + rows[name]["b"] * b, atol=1e-6)


class Wide(nn.Module):
    """Two layers of tokens, for PEFT's Arrow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 8)
        self.config: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def arrow_folders(tmp_path: Path) -> list[str]:
    """Adapters with one dominant direction each, so that PEFT's 15 power iterations arrive."""
    found = []
    for k in range(4):
        folder = save_lora(
            tmp_path / f"arrow{k}", k, Wide(), r=3, alpha=6, targets=["first", "second"]
        )
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in tensors:
            if "lora_B" in name:
                tensors[name][:, 0] *= 12
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        found.append(str(folder))
    return found


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0), (4, 1.0)])
def test_arrow_is_pefts(tmp_path: Path, top_k: int, temperature: float) -> None:
    folders = arrow_folders(tmp_path)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    peft = quietly(create_arrow_model, Wide(), folders, config)
    wanted = peft(x).detach()
    model = Wide()
    with sm.routed(folders, router=sm.ArrowRouter(top_k, temperature)).attach(model):
        assert torch.allclose(model(x), wanted, atol=2e-5)
    assert not torch.allclose(model(x), wanted, atol=1e-1)


def test_arrow_gives_nothing_to_who_lacks_the_layer(folders: dict[str, Path]) -> None:
    mixed = sm.routed(folders, router=sm.ArrowRouter(top_k=3))
    weights = mixed.weigh("narrow", torch.randn(5, 4))
    assert float(weights[:, mixed.labels.index("c")].abs().max()) == 0
    assert torch.allclose(weights.sum(1), torch.ones(5))


class Signs(nn.Module):
    """A linear map, which two adapters correct for tokens of one kind each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def planted(flip: bool) -> tuple[Any, dict[str, Tensor]]:
    """Maps the first two inputs to the outputs, one way or the other."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["layer"]}
    B, A = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    prefix = "base_model.model.layer.lora_"
    return config, {f"{prefix}A.weight": A, f"{prefix}B.weight": -B if flip else B}


def planted_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def planted_batches(seed: int) -> list[dict[str, Tensor]]:
    """Tokens that say with their third and fourth entry which adapter is right."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 4, generator=g)
    kind = torch.arange(64) % 2
    x[:, 2:] = torch.eye(2)[kind] * 2
    y = (x[:, :1] + x[:, 1:2]) * torch.tensor([[1.0, 2.0, -1.0]]) * (1 - 2 * kind[:, None])
    return [{"x": x[:40], "y": y[:40]}, {"x": x[40:], "y": y[40:]}]


def test_a_learned_router_finds_who_is_right() -> None:
    clients = {"plus": planted(False), "minus": planted(True)}
    model, before = Signs(), copied(Signs())
    arguments: dict[str, Any] = {"loss": planted_loss}
    mixed = sm.routed(
        clients, planted_batches(0), model, router=sm.LearnedRouter(300, 0.05), **arguments
    )
    assert same(before, copied(model))
    assert not model.training or all(p.requires_grad for p in model.parameters())
    [held_out] = planted_batches(1)[:1]
    uniform = sm.routed(clients)
    losses = {}
    for name, one in {"learned": mixed, "uniform": uniform}.items():
        with one.attach(model), torch.no_grad():
            losses[name] = float(planted_loss(model, held_out))
    assert losses["learned"] < 0.02 * losses["uniform"]
    weights = mixed.weigh("layer", held_out["x"])[:, mixed.labels.index("plus")]
    assert torch.equal(weights > 0.5, torch.arange(40) % 2 == 0)


def test_usage_is_the_mean_weight(folders: dict[str, Path]) -> None:
    fixed = sm.routed(folders, router=sm.FixedRouter({"a": 0.75, "b": 0.25}))
    for row in fixed.usage([IDS], Zoo(), loss=lambda model, ids: model(ids)).values():
        assert row == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.0})
    arrow = sm.routed({"plus": planted(False), "minus": planted(True)}, router=sm.ArrowRouter(1))
    x = planted_batches(0)[0]["x"]
    row = arrow.usage([{"x": x}], Signs(), loss=lambda model, batch: model(batch["x"]))["layer"]
    assert sum(row.values()) == pytest.approx(1)
    assert max(row.values()) == 1  # both have one direction, so the first one gets every token


@pytest.mark.parametrize("router", ["uniform", "arrow", "fixed", "learned"])
def test_a_checkpoint_comes_back(folders: dict[str, Path], tmp_path: Path, router: str) -> None:
    made: dict[str, Any] = {
        "uniform": "uniform",
        "arrow": sm.ArrowRouter(2, 0.7),
        "fixed": sm.FixedRouter({"b": 0.2, "a": 1.5}),
        "learned": sm.LearnedRouter(steps=3, top_k=2),
    }
    learning = ([IDS], Zoo()) if router == "learned" else ()
    loss: Any = lambda model, ids: model(ids).square().mean()  # noqa: E731
    mixed = sm.routed(folders, *learning, router=made[router], loss=loss)
    mixed.save_pretrained(tmp_path / "out")
    again = sm.Routed.load(tmp_path / "out")
    assert again.labels == mixed.labels
    assert torch.equal(routed_outputs(again), routed_outputs(mixed))
    assert torch.allclose(
        merged_outputs(again.fold({"c": 1.0})), outputs(load(folders["c"])), atol=1e-6
    )
    again.save_pretrained(tmp_path / "twice")
    first, second = files(tmp_path / "out"), files(tmp_path / "twice")
    assert first.keys() == {ROUTED, FACTORS, ROUTER, "README.md"}
    assert (first[FACTORS], first[ROUTER]) == (second[FACTORS], second[ROUTER])
    with pytest.raises(sm.OutputExistsError):
        again.save_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == second
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(sm.OutputError, match=r"more than a folder of routed adapters: 'notes.txt'"):
        again.save_pretrained(tmp_path / "out", overwrite=True)


def test_the_order_of_adapters_decides_on_no_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    sm.routed(folders, router="arrow").save_pretrained(tmp_path / "one")
    turned = dict(reversed(folders.items()))
    sm.routed(turned, router="arrow").save_pretrained(tmp_path / "other")
    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_removed_means_gone(folders: dict[str, Path]) -> None:
    model = Zoo()
    attached = sm.routed(folders).attach(model)
    assert not torch.allclose(outputs(model), outputs(Zoo()), atol=1e-3)
    attached.remove()
    attached.remove()
    assert torch.equal(outputs(model), outputs(Zoo()))


# What is wrong is said before anything is done.


def changed_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / ROUTED).read_text())
        change(config)
        (folder / ROUTED).write_text(json.dumps(config))

    return damage


def resaved(folder: Path) -> None:
    tensors = load_file(folder / FACTORS)
    tensors["q.A"][0, 0] += 1
    save_file(tensors, folder / FACTORS)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (resaved, "another sha256"),
        (lambda folder: (folder / ROUTER).unlink(), "cannot be opened"),
        (lambda folder: shutil.copy(folder / FACTORS, folder / ROUTER), "another sha256"),
        (changed_json(lambda c: c.update(format=2)), "format 2"),
        (changed_json(lambda c: c["router"].update(kind="mine")), "kind 'mine'"),
        (changed_json(lambda c: c["router"].update(top_k=0)), "settings of the router"),
        (changed_json(lambda c: c["router"].update(more=0)), "settings of the router"),
        (changed_json(lambda c: c["adapters"].pop()), "one rank per adapter"),
        (changed_json(lambda c: c["layers"].pop("q")), "do not agree"),
        (changed_json(lambda c: c["layers"]["q"].update(ranks=[1, 1, 1])), "do not fit"),
        (changed_json(lambda c: c["config"].update(more=1)), "exactly"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], text: str
) -> None:
    sm.routed(folders, router="arrow").save_pretrained(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(sm.AdapterFormatError, match=text):
        sm.Routed.load(tmp_path / "out")


def test_an_output_that_exists_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(sm.OutputExistsError):
        sm.routed(folders).save_pretrained(folders["a"])


def refusals(tmp_path: Path) -> list[tuple[Callable[[], object], str]]:
    a, b = (save_lora(tmp_path / k, n, targets=LINEAR) for n, k in enumerate("ab"))
    both = {"a": a, "b": b}
    heads = save_lora(tmp_path / "heads", 3, targets=["q"], modules_to_save=["head"])
    biases = save_lora(tmp_path / "biases", 3, targets=["q"], bias="lora_only")
    return [
        (lambda: sm.routed(both, router="mine"), "router is 'uniform'"),
        (lambda: sm.routed(both, router=sm.LearnedRouter()), "is trained"),
        (lambda: sm.routed(both, [IDS], Zoo()), "learns nothing"),
        (lambda: sm.routed(both, router=sm.FixedRouter({"z": 1.0})), "the router names"),
        (lambda: sm.FixedRouter({"z": float("nan")}), "finite number"),
        (lambda: sm.ArrowRouter(top_k=0), "top_k"),
        (lambda: sm.ArrowRouter(temperature=0.0), "temperature"),
        (lambda: sm.LearnedRouter(steps=-1), "steps"),
        (lambda: sm.LearnedRouter(balance=-1.0), "balance"),
        (lambda: sm.routed([save_lora(tmp_path / "conv", 1)]), "linear layer"),
        (lambda: sm.routed([heads]), "modules_to_save='drop'"),
        (lambda: sm.routed([biases]), "no matrix"),
        (lambda: sm.routed(both, router="arrow").fold(), "depend on the token"),
        (lambda: sm.routed(both).fold({"z": 1.0}), "weights name"),
        (lambda: sm.routed(both).fold({"q": {"a": 1.0}}), "weights name"),
        (lambda: sm.routed(both).weigh("z", torch.ones(1, 1)), "no adapter has a layer"),
    ]


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=needs_peft_21 if n == 11 else ()) for n in range(16)]
)
def test_what_cannot_be_routed_is_refused(tmp_path: Path, number: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call, text = refusals(tmp_path)[number]
        with pytest.raises(sm.MethodError, match=text):
            call()


def test_a_model_without_the_layers_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(sm.ModelMismatchError):
        sm.routed(folders).attach(nn.Linear(3, 3))
