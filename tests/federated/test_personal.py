"""FedIT's family and results for single clients:
goldens, laws against dense updates, degenerate inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sapmerge as sm
from sapmerge import federated as fed
from tests.federated.helpers import ALL, uploads
from tests.models import load, products, save_lora

GOLDENS = Path(__file__).parents[1] / "goldens" / "federated"
LORA, PILOT = load_file(GOLDENS / "fedlora.safetensors"), load_file(GOLDENS / "pilot.safetensors")
SAMPLES = (10.0, 30.0, 20.0, 40.0)

quiet = pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")


def adapter(layers: dict[str, tuple[Tensor, Tensor]], label: str, rank: int) -> sm.Adapter:
    """An adapter in memory from float64 factors, which it rounds to float32."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(layers)}
    state = {
        f"base_model.model.{name}.lora_{part}.weight": tensor.float()
        for name, (B, A) in layers.items()
        for part, tensor in (("A", A), ("B", B))
    }
    return sm.Adapter.from_state_dict(config, state, label=label)


def golden_clients(kind: str, count: int) -> list[sm.Adapter]:
    found = [{"q": (LORA[f"{kind}.{k}.B"], LORA[f"{kind}.{k}.A"])} for k in range(count)]
    return [adapter(layers, f"c{k}", layers["q"][1].shape[0]) for k, layers in enumerate(found)]


def golden_layer(kind: str, count: int, weights: Sequence[float]) -> sm.Layer:
    updates = tuple(sm.LowRank(LORA[f"{kind}.{k}.B"], LORA[f"{kind}.{k}.A"]) for k in range(count))
    return sm.Layer("q", updates, weights=tuple(weights))


def dense(merged: sm.Merged) -> dict[str, Tensor]:
    return {name: update.dense().double() for name, update in merged.updates()}


@pytest.mark.parametrize(
    ("method", "wanted", "tolerance"),
    [
        (fed.fedit(), LORA["fedit.B"] @ LORA["fedit.A"], 1e-12),
        (fed.flora(), LORA["mean"], 1e-12),
        (fed.fedrpca(), LORA["mean"], 1e-12),
        (fed.yoco(), LORA["yoco.B"] @ LORA["yoco.A"], 1e-12),
        (fed.yoco(components=3), LORA["fedit.B"] @ LORA["fedit.A"], 1e-12),
    ],
    ids=["fedit", "flora", "fedrpca", "yoco", "yoco with all components"],
)
def test_rules_of_one_rank(method: sm.Method, wanted: Tensor, tolerance: float) -> None:
    found = method(golden_layer("in", 4, SAMPLES)).dense()
    assert torch.linalg.norm(found - wanted) <= tolerance * torch.linalg.norm(wanted)


def test_hetlora() -> None:
    update = fed.hetlora()(golden_layer("mixed", 3, (1, 1, 1)))
    assert isinstance(update, sm.LowRank)
    assert torch.allclose(update.B, LORA["het.B"], atol=1e-12)
    assert torch.allclose(update.A, LORA["het.A"], atol=1e-12)


def test_ffa_is_the_mean_where_A_is_shared() -> None:
    layer = golden_layer("in", 4, SAMPLES)
    shared = sm.Layer(
        "q", tuple(sm.LowRank(u.B, layer.updates[0].A) for u in layer), weights=SAMPLES
    )  # type: ignore[union-attr]
    found = fed.ffa()(shared)
    assert found.rank == 3
    assert torch.allclose(found.dense(), sm.mean()(shared).dense(), atol=1e-13)
    with pytest.raises(sm.MethodError, match="do not share A"):
        fed.ffa()(layer)


def test_fedrpca_separates_what_is_common_from_single_entries() -> None:
    """Planted: one rank-1 update that all share, and large entries of single clients."""
    torch.manual_seed(0)
    common, updates = torch.randn(20, 1).double() @ torch.randn(1, 15).double(), []
    for _ in range(12):
        spikes = torch.zeros(20, 15).double()
        spikes[torch.randint(20, (6,)), torch.randint(15, (6,))] = 5.0
        updates.append(sm.Dense(common + spikes))
    layer = sm.Layer("q", tuple(updates))
    low = fed.fedrpca(beta=0.0)(layer).dense()
    assert torch.linalg.norm(low - common) < 1e-3 * torch.linalg.norm(common)
    assert torch.linalg.norm(fed.fedrpca()(layer).dense() - common) > 0.2 * torch.linalg.norm(
        common
    )


@quiet
def test_fedex_is_two_adapters_that_are_the_mean(tmp_path: Path) -> None:
    made = fed.fedex(golden_clients("in", 4), SAMPLES)
    apart, residual = dense(made.adapter)["q"], dense(made.residual)["q"]
    assert torch.allclose(apart, LORA["fedit.B"] @ LORA["fedit.A"], atol=1e-5)
    assert torch.allclose(residual, LORA["fedex.residual"], atol=1e-5)
    assert torch.allclose(apart + residual, LORA["mean"], atol=1e-5)
    made.adapter.save_pretrained(tmp_path / "adapter")
    made.residual.save_pretrained(tmp_path / "residual")
    stored = [products(tmp_path / name, 1.0)["q"] for name in ("adapter", "residual")]
    assert torch.allclose(stored[0] + stored[1], LORA["mean"], atol=1e-5)
    # min(m, n), below (K + 1) r
    assert sm.Adapter.load(tmp_path / "residual").modules["q"].rank <= 8


def test_flex_gives_every_client_its_rank(tmp_path: Path) -> None:
    made = fed.flex(golden_clients("mixed", 3), samples=[1, 2, 1])
    made.save_pretrained(tmp_path / "out")
    for k, rank in enumerate((2, 4, 3)):
        found = sm.Adapter.load(tmp_path / "out" / f"c{k}")
        assert found.modules["q"].rank == rank
        assert torch.allclose(found.update("q").dense().double(), LORA[f"flex.{k}"], atol=1e-5)
    with pytest.raises(sm.MethodError, match="ranks name"):
        fed.flex(golden_clients("mixed", 3), ranks={"c0": 2})


# Pilot's weights.

N = (100, 300, 50, 80, 80, 400)


def pilot_clients(count: int = 6) -> list[sm.Adapter]:
    return [
        adapter(
            {name: (PILOT[f"in.{k}.{name}.B"], PILOT[f"in.{k}.{name}.A"]) for name in "ab"},
            f"c{k}",
            3,
        )
        for k in range(count)
    ]


@quiet
@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("samples", ["equal", "samples"])
def test_weights_of_neighbours(count: int, samples: str) -> None:
    W = fed.neighbours(pilot_clients(), count, N if samples == "samples" else None)
    assert torch.allclose(W, PILOT[f"W.M{count}.{samples}"], atol=1e-6)
    assert torch.allclose(W.sum(1), torch.ones(6).double())


@quiet
def test_weights_with_a_share_of_ones_own() -> None:
    W = fed.neighbours(pilot_clients(), 2, N, self_weight=0.5)
    assert torch.allclose(W, PILOT["W.M2.self0.5"], atol=1e-6)


@quiet
def test_copies_take_all_of_the_neighbours_share() -> None:
    """d = 0 is a limit, not 1 / (0 + eps)."""
    clients = pilot_clients(4)
    same = [clients[0], clients[0].relabelled("copy"), clients[1], clients[2]]
    W = fed.neighbours(same, 2)
    assert W[0].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    golden = [clients[k] for k in range(3)] + [clients[0].relabelled("dup")]
    found = fed.neighbours(golden, 2)
    assert torch.allclose(found.sum(1), torch.ones(4).double())
    assert found[0, 3] == pytest.approx(float(2 / 3))


@quiet
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_laws_of_neighbours(distance: Any) -> None:
    clients = pilot_clients()
    W = fed.neighbours(clients, 2, N, distance=distance)
    order = [3, 0, 5, 1, 4, 2]
    permuted = fed.neighbours(
        [clients[k] for k in order], 2, [N[k] for k in order], distance=distance
    )
    assert torch.equal(permuted, W[order][:, order])
    torch.manual_seed(1)
    R = torch.randn(3, 3).double() + 3 * torch.eye(3).double()
    again = [
        adapter(
            {
                n: (PILOT[f"in.{k}.{n}.B"] @ R, torch.linalg.solve(R, PILOT[f"in.{k}.{n}.A"]))
                for n in "ab"
            },
            f"c{k}",
            3,
        )
        for k in range(6)
    ]
    assert torch.allclose(fed.neighbours(again, 2, N, distance=distance), W, atol=1e-5)
    alone = fed.neighbours(clients[:1], distance=distance)
    assert alone.tolist() == [[1.0]]


def test_what_neighbours_warns_of_and_refuses() -> None:
    clients = pilot_clients(3)
    long = adapter({n: (10 * PILOT[f"in.5.{n}.B"], PILOT[f"in.5.{n}.A"]) for n in "ab"}, "long", 3)
    zero = adapter({n: (0 * PILOT[f"in.5.{n}.B"], PILOT[f"in.5.{n}.A"]) for n in "ab"}, "zero", 3)
    with pytest.warns(
        sm.SapmergeWarning, match="the nearest by euclidean distance are the shortest"
    ):
        fed.neighbours([*clients, long])
    with pytest.warns(sm.SapmergeWarning, match="near to everybody"):
        fed.neighbours([*clients, zero])
    with pytest.raises(sm.MethodError, match="'zero' is zero and has no direction"):
        fed.neighbours([*clients, zero], distance="cosine")
    for wrong in ({"count": 0}, {"self_weight": 1.5}, {"samples": [1, 2, 0]}, {"distance": "city"}):
        with pytest.raises(sm.MethodError):
            fed.neighbours(clients, **wrong)  # type: ignore[arg-type]


def test_cosine_does_not_see_norms() -> None:
    clients = pilot_clients(4)
    scaled = [
        adapter(
            {n: ((k + 1) * PILOT[f"in.{k}.{n}.B"], PILOT[f"in.{k}.{n}.A"]) for n in "ab"},
            f"c{k}",
            3,
        )
        for k in range(4)
    ]
    one, other = (fed.neighbours(some, 2, distance="cosine") for some in (clients, scaled))
    assert torch.allclose(one, other, atol=1e-6)


# Personalised results.


@quiet
def test_personalised_results(tmp_path: Path) -> None:
    clients, W = pilot_clients(), PILOT["W.M2.samples"]
    made = fed.personalize(clients, W)
    made.save_pretrained(tmp_path / "out")
    for k in range(6):
        found, in_memory = sm.Adapter.load(tmp_path / "out" / f"c{k}"), dense(made[f"c{k}"])
        for name in "ab":
            wanted = PILOT[f"personal.{name}"][k]
            assert torch.allclose(found.update(name).dense().double(), wanted, atol=1e-5)
            assert torch.allclose(in_memory[name], wanted, atol=1e-5)
            assert found.modules[name].rank <= 9  # itself and two neighbours
    assert made.report["c0"].adapters[0].weight == pytest.approx(float(W[0, 0]))


def test_every_update_is_read_once_for_all_rows(tmp_path: Path, monkeypatch) -> None:
    torch.set_num_threads(2)
    clients = [sm.Adapter.load(folder) for folder in uploads(tmp_path, 4, targets=ALL)]
    made = fed.personalize(clients, torch.full((4, 4), 0.25))
    reads: list[tuple[str, str]] = []
    real = sm.Adapter.update
    monkeypatch.setattr(
        sm.Adapter,
        "update",
        lambda self, name: reads.append((self.digest, name)) or real(self, name),
    )
    made.save_pretrained(tmp_path / "out")
    assert sorted(reads) == sorted(
        (client.digest, name) for client in clients for name in client.modules
    )
    load(tmp_path / "out" / "client0")  # PEFT reads it
    first, last = (
        (tmp_path / "out" / f"client{k}" / "adapter_model.safetensors").read_bytes() for k in (0, 3)
    )
    alone = sm.merge(clients, method=sm.mean(), weights=[0.25] * 4)
    alone.save_pretrained(tmp_path / "alone")
    assert first == last == (tmp_path / "alone" / "adapter_model.safetensors").read_bytes()


def test_a_method_can_be_personalised(tmp_path: Path) -> None:
    clients = [sm.Adapter.load(folder) for folder in uploads(tmp_path, 3)]
    W = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    made = fed.personalize(clients, W, method=sm.ties(0.5), labels=["x", "y"])
    for name, used in (("x", clients[:2]), ("y", clients[1:])):
        wanted = dense(sm.merge(used, method=sm.ties(0.5), weights=[0.5, 0.5]))
        assert all(torch.equal(dense(made[name])[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "W", [[[1.0, 0.0]], [[0.6, 0.6], [0.5, 0.5]], [[float("nan"), 1.0], [0.5, 0.5]]]
)
def test_a_wrong_matrix_is_refused(W: list[list[float]]) -> None:
    with pytest.raises(sm.MethodError):
        fed.personalize(pilot_clients(2), W)


def test_nothing_is_written_where_a_result_is_not_finite(tmp_path: Path) -> None:
    clients = pilot_clients(2)
    made = fed.personalize(clients, torch.eye(2))
    (tmp_path / "out").mkdir()
    with pytest.raises(sm.OutputExistsError):
        made.save_pretrained(tmp_path / "out")

    def broken(layer: sm.Layer) -> sm.Update:
        return layer.updates[0].scaled(float("nan") if layer.name == "b" else 1.0)

    with pytest.raises(sm.NonFiniteError):
        fed.personalize(clients, torch.eye(2), method=broken).save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_a_folder_of_adapters_is_replaced(tmp_path: Path) -> None:
    clients = [save_lora(tmp_path / f"c{k}", seed=k, targets="q") for k in range(2)]
    out = tmp_path / "out"
    fed.personalize(clients, torch.eye(2)).save_pretrained(out)
    mean = fed.by_task(clients, ["one", "one"])
    mean.save_pretrained(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["one"]
    with pytest.raises(sm.OutputError, match="holds the input"):
        mean.save_pretrained(tmp_path, overwrite=True)
    (out / "one" / "notes.txt").write_text("mine")
    with pytest.raises(sm.OutputError, match=r"one' holds more than an adapter: 'notes.txt'"):
        mean.save_pretrained(out, overwrite=True)
    (out / "one" / "notes.txt").rename(out / "notes.txt")
    with pytest.raises(sm.OutputError, match=r"holds 'notes.txt': it is not a folder of adapters"):
        mean.save_pretrained(out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_one_mean_per_task() -> None:
    made = fed.by_task(pilot_clients(), ["t0", "t0", "t0", "t1", "t1", "t1"], N)
    for task in (0, 1):
        for name in "ab":
            assert torch.allclose(
                dense(made[f"t{task}"])[name], PILOT[f"task{task}.{name}"], atol=1e-5
            )
    with pytest.raises(sm.MethodError, match="as many tasks"):
        fed.by_task(pilot_clients(), ["t0"])


def connected(folder: Path, count: int) -> list[Path]:
    """Adapters with a language model's layer, a connector's, and a head saved whole."""
    settings = {"targets": r"q|layers\.1\.v", "modules_to_save": ["narrow"]}
    return [save_lora(folder / f"c{k}", seed=k, **settings) for k in range(count)]


def test_pilot_takes_text_from_neighbours_and_the_connector_from_the_task(tmp_path: Path) -> None:
    folders = connected(tmp_path, 4)
    W = torch.tensor(
        [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0.5, 0, 0.5]]
    ).double()
    tasks, samples = ["x", "x", "y", "y"], [1, 3, 1, 1]
    made = fed.pilot(folders, tasks, W, samples, connector="layers.1.v")
    made.save_pretrained(tmp_path / "out")
    own = [products(folder, 2.0) for folder in folders]
    heads = [
        load_file(folder / "adapter_model.safetensors")["base_model.model.narrow.weight"]
        for folder in folders
    ]
    for k, task in enumerate(([0.25, 0.75, 0, 0],) * 2 + ([0, 0, 0.5, 0.5],) * 2):
        found = products(tmp_path / "out" / f"c{k}", 1.0)
        text = sum(float(W[k, i]) * own[i]["q"] for i in range(4))
        connector = sum(task[i] * own[i]["layers.1.v"] for i in range(4))
        assert torch.allclose(found["q"], text, atol=1e-5)
        assert torch.allclose(found["layers.1.v"], connector, atol=1e-5)
        head = load_file(tmp_path / "out" / f"c{k}" / "adapter_model.safetensors")[
            "base_model.model.narrow.weight"
        ]
        assert torch.allclose(head, sum(task[i] * heads[i] for i in range(4)), atol=1e-6)


def test_a_connector_that_one_client_lacks_is_an_error(tmp_path: Path) -> None:
    folders = connected(tmp_path, 2)
    lacking = save_lora(tmp_path / "lacking", seed=7, targets="q")
    with pytest.raises(sm.IncompatibleAdaptersError, match=r"'lacking' lacks 'layers\.1\.v'"):
        fed.by_task([*folders, lacking], ["x", "x", "x"])
    with pytest.raises(sm.IncompatibleAdaptersError, match=r"'lacking' lacks 'layers\.1\.v'"):
        fed.pilot([*folders, lacking], ["x", "x", "x"], torch.eye(3), connector="layers.1.v")
