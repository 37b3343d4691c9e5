"""The demo: honest splits, reproducible domains, every file and number it promises.
Trained for a few steps only.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sapmerge as sm
from sapmerge import demo, methods
from sapmerge.cli import main
from sapmerge.demo import DemoResult, data, domains, training
from sapmerge.demo.clock import Clock
from sapmerge.demo.lessons import PICTURES
from sapmerge.demo.report import BAD
from sapmerge.errors import MethodError, OutputExistsError, SapmergeError

pytest.importorskip("transformers", reason="the demo trains a CLIPModel: pip install transformers")
pytest.importorskip(
    "sklearn", reason="the demo's digits come with scikit-learn: pip install 'sapmerge[demo]'"
)
pytest.importorskip("matplotlib", reason="the demo draws a chart: pip install 'sapmerge[demo]'")

transformers = pytest.importorskip("transformers")
PeftModel = pytest.importorskip("peft").PeftModel
COMPARED = tuple(name for name in ("sap", "mean", "ties") if name in methods.__all__)


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load_digits()


@pytest.fixture(scope="module")
def splits(digits: data.Digits) -> data.Splits:
    return data.split(digits.labels, anchors=32, seed=0)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, list[str]]:
    said = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo,
            "QUICK",
            training.Plan(base_steps=40, adapter_steps=8, batch_size=32, adapter_rate=1e-2),
        )
        result = demo.run(
            tmp_path_factory.mktemp("demo"), quick=True, methods=COMPARED, say=said.append
        )
    return result, said


def parts(splits: data.Splits) -> dict[str, set[int]]:
    return {name: set(getattr(splits, name).tolist()) for name in ("anchors", "test", "train")}


def test_as_data(outcome, monkeypatch, capsys):
    """`demo --json` and `--quiet`, of a demo that has run."""
    result, _ = outcome
    told = {}

    def run(output, *, say, **options):
        told.update(options)
        say("begun")
        return result

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo", "--json", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert (err, told["seed"], told["progress"]) == ("begun\n", 3, None)
    data = json.loads(out)
    assert data["merged"] == result.merged
    assert data["zero_shot"] == result.zero_shot
    assert (data["chart"], data["output"]) == (str(result.chart), str(result.output))
    assert [one["sentence"] for one in data["lessons"]] == [one.sentence for one in result.lessons]
    assert main(["demo", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert told["progress"] is False


def test_digits_are_real_and_in_range(digits):
    assert digits.images.shape == (1797, 8, 8)
    assert digits.images.min() == 0
    assert digits.images.max() == 1
    assert digits.labels[:10].tolist() == list(range(10))
    # No two instances are the same image, so indices that differ are digits that differ.
    assert len(torch.unique(digits.images.flatten(1), dim=0)) == 1797


def test_no_test_digit_is_trained_on_or_an_anchor(digits, splits):
    found = parts(splits)
    assert {name: len(part) for name, part in found.items()} == {
        "anchors": 32,
        "test": 400,
        "train": 1365,
    }
    # sizes add up to 1797, so they are disjoint
    assert set.union(*found.values()) == set(range(1797))
    sources = [set(index.tolist()) for index in splits.sources.values()]
    assert set.union(*sources) == found["train"]
    assert sum(map(len, sources)) == len(found["train"])


def test_every_part_holds_all_classes(digits, splits):
    assert digits.labels[splits.test].bincount().tolist() == [40] * 10
    assert sorted(digits.labels[splits.anchors].bincount().tolist()) == [3] * 8 + [4] * 2
    for index in splits.sources.values():
        assert digits.labels[index].bincount(minlength=10).min() >= 25


def test_the_split_depends_on_the_seed_alone(digits, splits):
    torch.manual_seed(99)
    assert parts(data.split(digits.labels, 32, seed=0)) == parts(splits)
    assert parts(data.split(digits.labels, 32, seed=1)) != parts(splits)


@pytest.mark.parametrize(
    "style", [domains.generic, *domains.DOMAINS.values()], ids=["generic", *domains.DOMAINS]
)
def test_a_style_is_deterministic_and_in_range(style, digits):
    images = domains.render(digits.images[:20], style, data.generator(3, "x"))
    assert images.shape == (20, 3, domains.SIZE, domains.SIZE)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.flatten(1).std(1).min() > 0.05  # a digit is visible on each
    assert torch.equal(images, domains.render(digits.images[:20], style, data.generator(3, "x")))
    assert not torch.equal(
        images, domains.render(digits.images[:20], style, data.generator(4, "x"))
    )


def test_domains_differ_as_they_say(digits):
    images = {
        name: domains.render(digits.images[:200], style, data.generator(0, "x"))
        for name, style in {"generic": domains.generic, **domains.DOMAINS}.items()
    }
    colour = {name: float((x.amax(1) - x.amin(1)).mean()) for name, x in images.items()}
    assert colour["generic"] == 0
    assert colour["outline"] == 0
    assert colour["colour"] > 3 * max(colour["ink"], colour["chalk"]) > 0
    corners = {name: x[..., :3, :3].mean((1, 2, 3)) for name, x in images.items()}
    assert corners["chalk"].max() < 0.2  # a dark board, always
    for name in ("generic", "ink", "outline"):  # both polarities
        assert corners[name].min() < -0.5
        assert corners[name].max() > 0.5
    detail = {name: float((x[..., 1:] - x[..., :-1]).abs().mean()) for name, x in images.items()}
    assert detail["chalk"] > 1.3 * detail["ink"]  # grain


def test_captions_are_tokens_that_end(digits):
    tokens = data.captions([3, 7], [0, 3])
    words = [[data.VOCABULARY[k] for k in row] for row in tokens["input_ids"].tolist()]
    assert words[0] == ["<start>", "a", "photo", "of", "the", "digit", "three", "<end>"]
    assert words[1] == ["<start>", "the", "number", "seven", "<end>", "<pad>", "<pad>", "<pad>"]
    assert tokens["attention_mask"].sum(1).tolist() == [8, 5]


def test_anchors_are_generic_pairs_of_their_own_digits(digits, splits):
    batches = data.anchor_batches(digits.take(splits.anchors), seed=0)
    assert [len(batch["pixel_values"]) for batch in batches] == [16, 16]
    images = torch.cat([batch["pixel_values"] for batch in batches])
    # grey: the generic style, and no domain but the outline
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    again = data.anchor_batches(digits.take(splits.anchors), seed=0)
    assert all(
        torch.equal(a[key], b[key]) for a, b in zip(batches, again, strict=True) for key in a
    )
    # Each caption names the digit of its image, by index of the split.
    captions = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    named = [{data.VOCABULARY[k] for k in row} & set(data.CLASSES) for row in captions]
    assert named == [{data.CLASSES[k]} for k in digits.labels[splits.anchors].tolist()]


def test_training_depends_on_the_seed_alone(digits, splits, tmp_path):
    plan = training.Plan(base_steps=2, adapter_steps=2, batch_size=8)
    few = digits.take(splits.train[:50])
    states = []
    for run in ("a", "b"):
        torch.rand(3)
        base = training.train_base(few, plan, 5, tmp_path / run / "base")
        frozen = {name: value.clone() for name, value in base.state_dict().items()}
        adapted = training.train_adapter(
            base, few, domains.DOMAINS["ink"], "ink", plan, 5, tmp_path / run / "ink"
        )
        assert all(torch.equal(value, frozen[name]) for name, value in base.state_dict().items())
        states.append(adapted.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(
        name.endswith("lora_B.default.weight") and value.any() for name, value in states[0].items()
    )


def test_the_result_is_complete(outcome):
    result, said = outcome
    every = list(domains.DOMAINS)
    assert list(result.merged) == list(COMPARED)
    merged = [*result.merged.values(), *result.with_bad.values()]
    for accuracies in (result.zero_shot, result.own, result.single, *merged):
        assert list(accuracies) == every
        assert all(0 <= value <= 1 for value in accuracies.values())
    for accuracies in (result.zero_shot, result.own, *result.merged.values()):
        assert all(
            400 * value == pytest.approx(round(400 * value), abs=1e-3)
            for value in accuracies.values()
        )
    assert (result.anchors, result.tested, result.quick) == (32, 400, True)
    assert list(result.seconds) == ["base model", "adapters", "lessons", "merging"]
    assert result.chart.read_bytes().startswith(b"\x89PNG")
    assert len(said) == 1 + len(every) + 1 + 1 + len(COMPARED)
    assert list(result.with_bad) == list(COMPARED)
    assert [lesson.picture.name for lesson in result.lessons] == list(PICTURES)
    for lesson in result.lessons:
        assert lesson.picture.read_bytes().startswith(b"\x89PNG")
        assert lesson.sentence in str(result)


def test_the_table_holds_every_number_and_the_caveat(outcome):
    result, _ = outcome
    text = str(result)
    alone, beside = text.split("merged from these three and one that calls each digit the next")

    def rows_of(text: str) -> dict[str, list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("  ")]
        return {line[:30].strip(): line[30:].split() for line in lines}

    rows = rows_of(alone)
    for label, accuracies in result.with_bad.items():
        expected = [*accuracies.values(), sum(accuracies.values()) / 4]
        assert rows_of(beside)[label] == [f"{100 * value:.1f}" for value in expected]
    table = {"zero-shot": result.zero_shot, "adapter of the domain": result.own, **result.merged}
    for label, accuracies in table.items():
        expected = [*accuracies.values(), sum(accuracies.values()) / 4]
        assert rows[label] == [f"{100 * value:.1f}" for value in expected]
    assert "This demonstrates the pipeline. It is no evidence for or against any method" in text
    assert "Quick mode" in text
    assert "Quick mode" not in str(replace(result, quick=False))


@pytest.mark.parametrize("name", COMPARED)
def test_the_saved_adapter_has_the_accuracy_reported(outcome, name, digits, splits):
    """The number was measured with `apply_to`; PEFT, loading the file on the saved base,
    finds the same.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    result, _ = outcome
    test = digits.take(splits.test)
    images = domains.render(
        test.images, domains.DOMAINS["chalk"], data.generator(0, "test", "chalk")
    )
    base = transformers.CLIPModel.from_pretrained(result.base)
    assert training.accuracy(base, images, test.labels) == result.zero_shot["chalk"]
    model = peft.PeftModel.from_pretrained(base, str(result.merged_adapter(name, "chalk")))
    # Rounding may move a digit or two that lies on a border.
    assert training.accuracy(model, images, test.labels) == pytest.approx(
        result.merged[name]["chalk"], abs=2.1 / 400
    )


def test_the_merge_saw_the_three_other_adapters(outcome):
    result, _ = outcome
    for left_out in domains.DOMAINS:
        card = (result.merged_adapter("mean", left_out) / "README.md").read_text()
        assert {domain for domain in domains.DOMAINS if f"{domain} " in card} == set(
            domains.DOMAINS
        ) - {left_out}
        card = (result.merged_adapter("mean", left_out, bad=True) / "README.md").read_text()
        assert "| bad | 1 |" in card


def test_sentences_are_of_the_adapters(outcome):
    """Cosines, losses and shares, against the definitions on what PEFT loads."""
    result, _ = outcome
    disagree, judged, _, pruned, _ = (lesson.sentence for lesson in result.lessons)
    adapters = {
        name: sm.Adapter.load(result.output / "adapters" / name) for name in (*domains.DOMAINS, BAD)
    }
    whole = {
        name: torch.cat([adapter.update(layer).dense().flatten() for layer in adapter.modules])
        for name, adapter in adapters.items()
    }
    cosine = torch.cosine_similarity
    pairs = [
        cosine(whole[a], whole[b], 0) for a in domains.DOMAINS for b in domains.DOMAINS if a < b
    ]
    assert f"a cosine of {min(pairs):+.2f} to {max(pairs):+.2f}" in disagree
    base = transformers.CLIPModel.from_pretrained(result.base)
    model = PeftModel.from_pretrained(base, result.output / "adapters" / BAD).get_base_model()
    digits, splits = data.load_digits(), data.split(data.load_digits().labels, 32, 0)
    batches = data.anchor_batches(digits.take(splits.anchors), 0)
    with torch.no_grad():
        loss = sum(float(sm.alignment(model.eval(), batch)) for batch in batches) / len(batches)
    assert f"({loss:.2f} for the bad one)" in judged
    assert all(0.5 < float(share) / 100 <= 1 for share in re.findall(r"(\d+)%", pruned))


def test_the_bar_counts_all_steps(tmp_path, monkeypatch):
    """What is announced is what is done."""
    clocks = []

    class Watched(Clock):
        def __post_init__(self):
            clocks.append(self)
            self.done = 0

        def step(self, count=1):
            self.done += count

    monkeypatch.setattr(demo, "Clock", Watched)
    monkeypatch.setattr(demo, "QUICK", training.Plan(base_steps=3, adapter_steps=2, batch_size=16))
    demo.run(tmp_path / "demo", quick=True, methods=["mean"])
    (clock,) = clocks
    assert clock.done == clock.total
    (tmp_path / "demo" / "merged" / "notes.txt").write_text("mine")
    again = demo.run(tmp_path / "demo", quick=True, methods=["mean"], overwrite=True)
    assert again.chart.exists()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes\.txt.*not of a demo"):
        demo.run(tmp_path / "demo", quick=True, methods=["mean"], overwrite=True)
    assert again.chart.exists()


def test_a_bar_says_what_is_done_and_for_how_long(capsys):
    clock = Clock(100, shown=True)
    clock.begin("the adapter of 'ink'")
    clock.step(50)
    clock.begin("merges by mean")
    clock.close()
    shown = capsys.readouterr().err
    assert "the adapter of 'ink'" in shown
    assert re.search(r"50 %.*merges by mean, .* left", shown)


def test_threads_and_random_state_are_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_digits", lambda: (_ for _ in ()).throw(SapmergeError("stop")))
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    with pytest.raises(SapmergeError, match="stop"):
        demo.run(tmp_path / "new")
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("module", "package"),
    [("sklearn.datasets", "scikit-learn"), ("matplotlib", "matplotlib"), ("peft", "peft")],
)
def test_a_missing_extra_says_how_to_install_it(tmp_path, monkeypatch, module, package):
    real = importlib.import_module

    def missing(name: str, *rest: object) -> object:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SapmergeError, match=rf'needs {package}.*pip install "sapmerge\[demo\]"'):
        demo.run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_importing_the_demo_imports_no_extra():
    check = (
        "import sys, sapmerge.demo; print(sorted({'sklearn', 'matplotlib', 'transformers'} & "
        "set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not an empty folder"):
        demo.run(tmp_path)
    with pytest.raises(OutputExistsError):
        demo.run(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_wrong_arguments_are_refused_before_any_work(tmp_path):
    with pytest.raises(MethodError, match="there is no method 'magic'"):
        demo.run(Path(tmp_path), methods=["magic"])
    for count in (0, 101):
        with pytest.raises(MethodError, match="1 to 100"):
            demo.run(tmp_path, anchors=count)
