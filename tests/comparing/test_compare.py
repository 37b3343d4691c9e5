"""Comparing: the numbers of separate runs, the model as it was, what is within noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.comparing import bench
from sapmerge.comparing.metric import Score
from sapmerge.merging import stream

from ..models import Block, copied, same, save_lora

EIGHT = ["mean", "task_arithmetic", "ties", "dare", "knots", "tsv", "iso_c", "lines"]
IMAGES = torch.randn(64, 12, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(12), Block(12)])
        self.head = nn.Linear(12, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.drop(x))


LABELS = Net().eval()(IMAGES).argmax(-1)


def right(model: nn.Module) -> Tensor:
    return (model(IMAGES).argmax(-1) == LABELS).float()


def energy(model: nn.Module) -> float:
    return float(model(IMAGES).detach().double().square().mean())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("compare")
    return [save_lora(root / f"a{k}", k, Net(), targets=["q", "v"], size=0.2) for k in range(3)]


def test_eight_methods_are_eight_separate_runs(folders: list[Path]) -> None:
    model = Net()
    before = copied(model)
    table = sm.compare(folders, EIGHT, model=model, evaluate=energy)
    assert same(before, copied(model))
    assert len(table.results) == 1 + 2 * len(EIGHT)
    assert table.results[0].scores["score"].value == energy(copy.deepcopy(model).eval())
    for row in table.results[1:]:
        method = sm.parse(row.recipe)
        separate = Net().eval()
        sm.merge(folders, method=method).apply_to(separate)
        assert row.scores["score"].value == energy(separate), row.name
        assert isinstance(method, sm.MatchEnergy) == (row.length == "matched")
        own = getattr(sm, row.name)()
        assert repr(method) == repr(own if row.length == "own" else sm.MatchEnergy(own))


@pytest.mark.parametrize("room", [1 << 29, 0])
def test_eight_methods_with_anchors_are_separate_runs_to_the_byte(
    folders: list[Path], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and report, whether what methods share fits into memory or not."""
    monkeypatch.setattr(bench, "_ROOM", room)
    monkeypatch.setattr(stream, "_HELD", room)
    loader = [{"x": IMAGES[:8]}, {"x": IMAGES[8:16]}]
    methods = ["mean", "ties", "tsv", "iso_c", "knots", "dare_ties", "sap", sm.ties(0.5)]
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(copied(model))
        return energy(model)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    table = sm.compare(folders, methods, loader, Net(), evaluate=evaluate, loss=loss)
    assert len(seen) == len(table.results) == 1 + 2 * len(methods)
    for row, weights in zip(table.results[1:], seen[1:], strict=True):
        separate, method = Net().eval(), sm.parse(row.recipe)
        anchors = (loader, Net()) if row.name == "sap" else ()
        merged = sm.merge(
            folders, *anchors, method=method, loss=loss if row.name == "sap" else None
        )
        merged.apply_to(separate)
        assert same(copied(separate), weights), (row.name, row.length)
        assert row.norm == sum(layer.norm**2 for layer in merged.report.layers) ** 0.5
        assert row.scores["score"].value == energy(separate)


def test_what_a_matched_length_is_a_multiple_of_is_merged_once(folders: list[Path]) -> None:
    merged = []

    def mine(layer: sm.Layer) -> sm.Update:
        merged.append(layer.name)
        return sm.on_one_layer(sm.mean(), layer)

    sm.compare(folders, {"mine": mine}, model=Net(), evaluate=energy)
    assert sorted(merged) == sorted(sm.Adapter.load(folders[0]).modules)


def test_the_norm_is_that_of_the_merged_update(folders: list[Path]) -> None:
    table = sm.compare(folders, ["mean"], model=Net(), evaluate=energy)
    merged = sm.merge(folders, method=sm.mean())
    wanted = sum(float(update.dense().square().sum()) for _, update in merged.updates()) ** 0.5
    assert table.results[1].norm == pytest.approx(wanted, rel=1e-5)
    adapters = [sm.Adapter.load(folder) for folder in folders]
    norms = [
        sum(float(a.update(name).dense().square().sum()) for name in a.modules) ** 0.5
        for a in adapters
    ]
    assert table.results[2].norm == pytest.approx(sum(norms) / 3, rel=1e-5)


def test_the_model_is_as_it_was(folders: list[Path]) -> None:
    model = Net()
    model.train()
    model.head.eval()

    def careless(model: Any) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        model.train()
        model.seen += 1
        return 0.0

    def failing(model: Any) -> float:
        model.seen += 1
        raise RuntimeError("no data")

    before = copied(model)
    sm.compare(folders, ["mean"], model=model, evaluate=careless)
    with pytest.raises(RuntimeError, match="no data"):
        sm.compare(folders, ["mean"], model=model, evaluate=failing)
    assert same(before, copied(model))
    assert float(model.seen) == 0
    assert model.training
    assert model.drop.training
    assert not model.head.training
    assert torch.is_grad_enabled()


def test_a_merge_applied_for_a_while(folders: list[Path]) -> None:
    model, applied = Net(), Net()
    merged = sm.merge(folders, method=sm.ties(0.3))
    merged.apply_to(applied)
    before = copied(model)
    with merged.applied(model) as report:
        assert same(copied(model), copied(applied))
        assert len(report.layers) == 4
    assert same(before, copied(model))
    with pytest.raises(KeyError), merged.applied(model):
        raise KeyError
    assert same(before, copied(model))


def test_what_is_within_noise(folders: list[Path]) -> None:
    """Wilson's interval, and the exact paired difference; two methods that differ in no sample."""
    table = sm.compare(
        {"one": folders[0], "two": folders[1]},
        {"mean": "mean", "again": sm.mean(), "far": "task_arithmetic"},
        model=Net(),
        evaluate=right,
        matched=False,
        scale=40.0,
    )
    rows = {row.name: row for row in table.rows}
    score = rows["mean"].scores["score"]
    assert score.samples is not None
    assert score.value == score.samples.mean()
    n, p, z = 64, score.value, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    span = score.interval
    assert span is not None
    assert (span.low, span.high) == pytest.approx((centre - half, centre + half))
    gap = table.behind(rows["again" if table.best.name == "mean" else "mean"])
    assert gap is not None
    if table.best.name != "far":
        assert (gap.value, gap.low, gap.high) == (0, 0, 0)
        assert {row.name for row in table.within_noise} >= {"mean", "again"}
    assert "within noise" in str(table) or "beyond noise" in str(table)
    assert "base model" in str(table)


def test_noise_by_hand() -> None:
    """96 of 100 against 50 of 100 is no noise; 96 against 95 is."""

    def result(name: str, count: int) -> sm.MethodResult:
        samples = torch.arange(100).lt(count).double().numpy()
        return sm.MethodResult(name, "own", name, {"acc": Score(count / 100, samples)})

    table = sm.Comparison((result("a", 95), result("b", 50), result("c", 96)), "acc")
    assert table.best.name == "c"
    assert [row.name for row in table.within_noise] == ["c", "a"]
    assert [row.name for row in table.rows] == ["c", "a", "b"]
    losses = sm.Comparison(table.results, "acc", maximize=False)
    assert [row.name for row in losses.within_noise] == ["b"]
    assert "b (own) is better than all others, beyond noise" in str(losses)


def test_one_number_tells_nothing_about_noise(folders: list[Path]) -> None:
    table = sm.compare(folders, ["mean"], model=Net(), evaluate=lambda model: {"e": energy(model)})
    assert table.metric == "e"
    assert table.within_noise == (table.best,)
    assert "cannot be told" in str(table)


def test_several_metrics(folders: list[Path]) -> None:
    def both(model: nn.Module) -> dict[str, Any]:
        return {"energy": energy(model), "right": right(model)}

    table = sm.compare(folders, ["mean"], model=Net(), evaluate=both, metric="right", matched=False)
    assert table.metric == "right"
    assert "energy" in str(table)
    with pytest.raises(sm.MethodError, match=r"'right'\], and no 'loss'"):
        sm.compare(folders, ["mean"], model=Net(), evaluate=both, metric="loss")


def test_what_a_merge_refuses_has_its_reason(folders: list[Path]) -> None:
    table = sm.compare(folders, ["mean", "slerp", "sap"], model=Net(), evaluate=energy)
    refused = {row.name: row.problem for row in table.results if row.problem}
    assert set(refused) == {"slerp", "sap"}
    assert "two adapters" in refused["slerp"]
    assert refused["slerp"] in str(table)
    only = sm.compare(folders, ["slerp"], model=Net(), evaluate=energy)
    with pytest.raises(sm.MethodError, match="no method of the comparison has a score"):
        _ = only.best
    assert "slerp" in str(only)


def test_anchors(folders: list[Path]) -> None:
    """Methods with anchors give what separate merges give; statistics are computed once."""
    passes = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        passes.append(1)
        return model(batch["x"]).square().mean()

    loader = [{"x": IMAGES[:8]}, {"x": IMAGES[8:16]}]
    methods = [sm.sap_original(0.3), sm.sap_original(0.6), "mean"]
    model = Net()
    table = sm.compare(folders, methods, loader, model, evaluate=energy, loss=loss, matched=False)
    together = len(passes)
    passes.clear()
    for row in table.results[1:]:
        separate = Net().eval()
        method = sm.parse(row.recipe)
        anchors = () if row.name == "mean" else (loader, separate)
        options = {} if row.name == "mean" else {"loss": loss}
        sm.merge(folders, *anchors, method=method, **options).apply_to(separate)
        assert row.scores["score"].value == energy(separate), row.name
    assert together < len(passes)


def test_resume(folders: list[Path], tmp_path: Path) -> None:
    counted = Counted()
    whole = sm.compare(folders, EIGHT[:3], model=Net(), evaluate=energy)
    options = {"model": Net(), "evaluate": counted, "folder": tmp_path / "kept"}
    first = sm.compare(folders, EIGHT[:2], **options)
    assert Counted.calls == 5
    again = sm.compare(folders, EIGHT[:3], **options)
    assert Counted.calls == 7
    assert [row.kept for row in again.results] == [True] * 5 + [False] * 2
    for one, other in zip(whole.results, again.results, strict=True):
        assert one.scores["score"].value == other.scores["score"].value
    assert [row.recipe for row in first.results] == [row.recipe for row in again.results[:5]]
    sm.compare(folders, EIGHT[:2], **options, weights=[1, 2, 3])
    assert Counted.calls == 12
    changed = Net()
    nn.init.zeros_(changed.head.bias)
    sm.compare(folders, EIGHT[:1], **(options | {"model": changed}))
    assert Counted.calls == 15


class Counted:
    calls = 0

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        Counted.calls += 1
        return {"score": energy(model), "right": right(model)}


def test_samples_come_back_from_the_folder(folders: list[Path], tmp_path: Path) -> None:
    one, two = (
        sm.compare(folders, ["mean", "ties"], model=Net(), evaluate=right, folder=tmp_path)
        for _ in range(2)
    )
    assert all(row.kept for row in two.results)
    assert str(one).split("seconds")[0] == str(two).split("seconds")[0]


def test_a_picture(folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = sm.compare(folders, ["mean", "ties"], model=Net(), evaluate=right)
    table.plot(tmp_path / "compare.svg")
    text = (tmp_path / "compare.svg").read_text()
    assert text.count("<!-- mean (own) -->") == 1
    assert "<!-- ties (matched) -->" in text


@pytest.mark.parametrize(
    ("methods", "evaluate", "message"),
    [
        ([], energy, "a list of methods"),
        ("mean", energy, "a list of methods"),
        (["tise"], energy, "did you mean 'ties'"),
        ([sm.ties], energy, "is not called yet"),
        ([3], energy, "cannot be called"),
        (["mean"], 3, "evaluate is a function"),
        (["mean"], lambda model: "much", "evaluate returns a number"),
        (["mean"], lambda model: {}, "empty mapping"),
        (["mean"], lambda model: torch.zeros(2, 2), "evaluate returns a number"),
    ],
)
def test_errors(folders: list[Path], methods: Any, evaluate: Any, message: str) -> None:
    with pytest.raises(sm.MethodError, match=message):
        sm.compare(folders, methods, model=Net(), evaluate=evaluate)


def test_every_merge_gets_what_the_base_model_got(folders: list[Path]) -> None:
    samples = iter([[1.0, 0.0], [1.0, 1.0], [1.0]])
    with pytest.raises(sm.MethodError, match=r"1 samples of 'score' for ties, and 2 for the base"):
        sm.compare(
            folders,
            ["mean", "ties"],
            model=Net(),
            evaluate=lambda _: next(samples),
            matched=False,
        )
    names = iter([{"a": 1.0}, {"b": 1.0}])
    with pytest.raises(sm.MethodError, match=r"\['b'\] for mean, and \['a'\] for the base model"):
        sm.compare(folders, ["mean"], model=Net(), evaluate=lambda _: next(names))


def test_a_metric_of_another_name_is_refused_before_any_merge(folders: list[Path]) -> None:
    asked = list[float]()

    def both(model: nn.Module) -> dict[str, float]:
        asked.append(energy(model))
        return {"energy": asked[-1]}

    with pytest.raises(sm.MethodError, match="no 'accuracy'"):
        sm.compare(folders, EIGHT, model=Net(), evaluate=both, metric="accuracy")
    assert len(asked) == 1


def test_one_method_is_better_than_nobody(folders: list[Path]) -> None:
    table = sm.compare(folders, ["mean"], model=Net(), evaluate=right, matched=False)
    assert str(table).endswith("mean (own) is the only method")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_in_half_precision(folders: list[Path], dtype: torch.dtype) -> None:
    table = sm.compare(folders, ["mean"], model=Net(), evaluate=lambda m: right(m).to(dtype))
    wanted = sm.compare(folders, ["mean"], model=Net(), evaluate=right)
    for row, same_row in zip(table.results, wanted.results):
        assert row.scores["score"].samples.tolist() == same_row.scores["score"].samples.tolist()


def test_a_metric_that_is_nan_is_named(folders: list[Path]) -> None:
    with pytest.raises(sm.NonFiniteError, match="'score' is NaN"):
        sm.compare(folders, ["mean"], model=Net(), evaluate=lambda model: float("nan"))
    with pytest.raises(sm.MethodError, match="loaded base model"):
        sm.compare(folders, ["mean"], evaluate=energy)
