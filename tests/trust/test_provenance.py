"""What an output says about itself is a claim:
it is read by one schema, and told from what was checked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sapmerge as sm
from sapmerge.cli import main
from sapmerge.io.writing import digest_of
from tests.trust.helpers import write_adapter


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]


@pytest.fixture
def out(tmp_path: Path, inputs: list[Path]) -> Path:
    sm.merge(inputs, method=sm.mean(), weights=[1.0, 2.0]).save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def metadata_of(out: Path) -> dict[str, str]:
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def forge(out: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """The output with other metadata: text as it comes, anything else as JSON."""
    written = {
        f"sapmerge.{key}": text if isinstance(text, str) else json.dumps(text)
        for key, text in changes.items()
    }
    file = out / "adapter_model.safetensors"
    tensors, metadata = tensors or load_file(file), metadata_of(out) | written
    save_file(
        tensors, file, metadata={key: text for key, text in metadata.items() if text != "absent"}
    )
    return out


HUGE = 10**400
RECIPES: list[Any] = [
    *(
        "null",
        "[1]",
        "{}",
        "",
        "{",
        "1",
        '"mean()"',
        "absent",
        '{"method": "mean()", "method": "mean()"}',
    ),
    *(
        {"method": value}
        for value in (None, 1, ["mean()"], "Magnitude()", "alignment", "Chain(1,2)", "x" * 10_000)
    ),
    *(
        {"method": value}
        for value in (
            "Sum",
            "Chain()",
            "Prune(1, 2)",
            "os.system('x')",
            "mean(1, 2, 3)",
            "",
            "Mean(",
        )
    ),
    *({"scale": value} for value in (HUGE, "1", None, True, [1])),
    *({"rank": value} for value in (0, -1, 1.5, "most", True, [4], HUGE)),
    *(
        {"weights": value}
        for value in (None, [1, 2], {"a": "x", "b": 1}, {"a": HUGE, "b": 1}, {"a": 1.0}, {"a/b": 1})
    ),
    *(
        {"base_model": 1},
        {"modules_to_save": 1},
        {"modules_to_save": {"head": 1}},
        {"loss": 3},
        {"unknown": 1},
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda value: str(value)[:30])
def test_a_forged_recipe_is_an_error_of_ours(out: Path, inputs: list[Path], recipe: Any) -> None:
    if isinstance(recipe, dict):
        recipe = json.loads(metadata_of(out)["sapmerge.recipe"]) | recipe
    forge(out, recipe=recipe)
    with pytest.raises(sm.SapmergeError):
        _told(sm.reproduce(out, inputs))


def _told(problems: list[str]) -> None:
    """A difference that is listed is told as well as an error."""
    assert problems
    raise sm.OutputError(problems[0])


@pytest.mark.parametrize(
    "change",
    [
        *({"weight": value} for value in ("x", None, HUGE, True, [1])),
        *({"label": value} for value in (None, 1, "a/b", "", "x" * 65, "\x1b[2J")),
        *({"digest": value} for value in (None, "", "0" * 63, "G" * 64)),
        *({"files": value} for value in (None, [], {"../x": "0" * 64}, {"adapter_config.json": 1})),
        {"more": 1},
        *("null", "{}", "[]", "[1]", "[null]", "[[]]", "absent", "[", "x" * 1000),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_forged_list_of_inputs_is_an_error_of_ours(
    out: Path, inputs: list[Path], change: Any
) -> None:
    entries = json.loads(metadata_of(out)["sapmerge.inputs"])
    forge(out, inputs=change if isinstance(change, str) else [entry | change for entry in entries])
    for check in (sm.verify, sm.reproduce):
        with pytest.raises(sm.AdapterFormatError, match="metadata"):
            check(out, inputs)


def test_more_commas_than_inputs_could_have(out: Path) -> None:
    """It is told from the text, before it becomes objects."""
    forge(out, inputs="[" + "1," * 1000 + "1]")
    with pytest.raises(sm.AdapterFormatError, match="is not the list of inputs that sapmerge"):
        sm.verify(out)


def test_a_field_of_another_type_is_named(out: Path, inputs: list[Path]) -> None:
    recipe = json.loads(metadata_of(out)["sapmerge.recipe"])
    forge(out, recipe=recipe | {"base_model": 1})
    with pytest.raises(sm.AdapterFormatError, match="'base_model' is 1, expected text or null"):
        sm.verify(out, inputs)


def test_fields_that_are_missing_are_named(out: Path) -> None:
    recipe = json.loads(metadata_of(out)["sapmerge.recipe"])
    for name in recipe:
        forge(out, recipe={key: value for key, value in recipe.items() if key != name})
        with pytest.raises(sm.AdapterFormatError, match=f"'{name}' is missing"):
            sm.verify(out)


def test_claims_are_called_claims_and_reproducing_is_the_proof(
    out: Path, inputs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors times 3 under a recipe of somebody else's, all digests made to fit."""
    tensors = {
        name: tensor * 3 for name, tensor in load_file(out / "adapter_model.safetensors").items()
    }
    digests = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }
    recipe = json.loads(metadata_of(out)["sapmerge.recipe"]) | {"method": "ties(density=0.2)"}
    forge(out, tensors, recipe=recipe, tensors_sha256=digest_of(digests))
    assert sm.verify(out, inputs) == []
    assert main(["verify", str(out), "--inputs", *map(str, inputs)]) == 0
    said = capsys.readouterr().out
    assert "made from" not in said
    assert "a claim" in said
    assert "reproduce" in said
    assert "adapter_model.safetensors differs" in sm.reproduce(out, inputs)


def test_the_digests_of_the_updates_are_compared_too(out: Path, inputs: list[Path]) -> None:
    entries = json.loads(metadata_of(out)["sapmerge.inputs"])
    forge(out, inputs=[entry | {"digest": "0" * 64} for entry in entries])
    assert sorted(sm.verify(out, inputs)) == [
        f"the metadata has another digest of the update of {label!r} than its files give"
        for label in "ab"
    ]


def test_weights_are_told_once(out: Path) -> None:
    entries = json.loads(metadata_of(out)["sapmerge.inputs"])
    forge(out, inputs=[entry | {"weight": 7.0} for entry in entries])
    assert sm.verify(out) == ["the weights of the recipe are not those of the inputs"]


@pytest.mark.parametrize("piece", ["{}", "[]", "1", '"a"', "null"])
def test_a_huge_list_of_inputs_takes_no_memory(out: Path, piece: str) -> None:
    """12 MB of text that would be hundreds of MB of objects."""
    file = out / "adapter_model.safetensors"
    forge(out, inputs="[" + f"{piece}," * (12_000_000 // (len(piece) + 1)) + f"{piece}]")
    program = (
        "import sys, sapmerge as sm\n"
        "sm.verify  # torch is imported now\n"
        "def line(key): return int([x for x in open('/proc/self/status') if "
        "x.startswith(key)][0].split()[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "start = line('VmRSS')\n"
        "try: sm.verify(sys.argv[1])\n"
        "except sm.SapmergeError: print(line('VmHWM') - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 3 * file.stat().st_size + (64 << 20)


def test_many_inputs_are_read(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    for number in range(40):
        shutil.copytree(adapter, tmp_path / f"a{number}")
    inputs = [tmp_path / f"a{number}" for number in range(40)]
    sm.merge(inputs, method=sm.mean()).save_pretrained(tmp_path / "out")
    assert sm.verify(tmp_path / "out", inputs) == []
    assert sm.reproduce(tmp_path / "out", inputs[::-1]) == []


SAID = {
    "anchors": "a" * 64,
    "model": "b" * 64,
    "count": 4,
    "batches": 1,
    "losses": {"base model": 0.5, "a": None},
    "decided": {"weights": {"a": 1.0, "b": 2.0}, "excluded": ["a"], "length": 1.0},
}


@pytest.mark.parametrize(
    "change",
    [
        *({key: value} for key in ("anchors", "model") for value in (1, "", "0" * 63, ["a"])),
        *({key: value} for key in ("count", "batches") for value in (0, -1, "1", True, 1.5)),
        *({"losses": value} for value in (None, [], {"a": "x"}, {"a": HUGE}, {"<b>": 1.0})),
        *({"decided": value} for value in (None, {"weights": "x"}, {"weights": {"a": [1]}})),
        *({"decided": {"excluded": value}} for value in (["../x"], [1], {"a": {"b": 1.0}})),
        {"more": 1},
        *("null", "[]", "[1]", "{", "x" * 1000),
    ],
    ids=lambda value: str(value)[:30],
)
def test_forged_anchors_are_an_error_of_ours(out: Path, inputs: list[Path], change: Any) -> None:
    recipe = json.loads(metadata_of(out)["sapmerge.recipe"]) | {"loss": "alignment"}
    forge(out, recipe=recipe, anchors=SAID)
    assert sm.verify(out) == []
    forge(out, anchors=change if isinstance(change, str) else SAID | change)
    for check in (sm.verify, sm.reproduce):
        with pytest.raises(sm.AdapterFormatError, match="the anchors in its metadata"):
            check(out, inputs)


def test_anchors_without_a_loss_do_not_fit(out: Path) -> None:
    forge(out, anchors=SAID)
    assert sm.verify(out) == ["the metadata has anchors, and the recipe no loss"]
