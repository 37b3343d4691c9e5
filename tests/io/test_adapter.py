"""The Adapter itself: labels, digests, pickles, the Hub, and the closed world as a property."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapmerge.errors import (
    AdapterFormatError,
    AdapterSecurityError,
    LimitExceededError,
    MethodError,
    SapmergeError,
    SapmergeWarning,
)
from sapmerge.io.adapter import Adapter
from tests.io.helpers import (
    PREFIX,
    accepted,
    good_config,
    good_tensors,
    module,
    refused,
    warned,
    write,
)
from tests.versions import needs_pickles


def test_labels(tmp_path: Path) -> None:
    assert accepted(write(tmp_path / "my adapter (2)")).label == "my_adapter_2_"
    assert accepted(write(tmp_path / ("x" * 100))).label == "x" * 64
    assert accepted(write(tmp_path / "...")).label == "adapter"
    adapter = accepted(tmp_path / "...", label="medical")
    assert adapter.label == "medical"
    assert adapter.relabelled("legal").label == "legal"
    assert adapter.relabelled("legal").digest == adapter.digest
    for bad in ("a/b", "x" * 65, "a b", "\x1b"):
        with pytest.raises(MethodError, match="label"):
            adapter.relabelled(bad)
    with pytest.raises(MethodError, match="no module 'x'"):
        adapter.update("x")
    with pytest.raises(MethodError, match="no saved tensor"):
        adapter.saved_tensor("x")


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    plain = accepted(write(tmp_path / "a"))
    config = good_config(lora_dropout=0.3, peft_version="1.0")
    assert accepted(write(tmp_path / "b", dict(reversed(config.items())))).digest == plain.digest
    assert accepted(write(tmp_path / "c", good_config(lora_alpha=9))).digest != plain.digest
    assert accepted(write(tmp_path / "d", tensors=good_tensors(seed=1))).digest != plain.digest
    assert plain.files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    import hashlib

    for name, digest in plain.files.items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == digest


def test_both_formats(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    warned(tmp_path, "adapter_model.bin is ignored")


def save_bin(folder: Path, content: object, **options: object) -> Path:
    write(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin", **options)  # type: ignore[arg-type]
    return folder


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


@needs_pickles
def test_pickles(tmp_path: Path) -> None:
    good = good_tensors()
    plain = accepted(write(tmp_path / "safe"))
    folder = save_bin(tmp_path / "bin", good)
    refused(
        folder,
        "adapter_model.bin",
        "Adapter.load(path, allow_pickle_weights=True)",
        error=AdapterSecurityError,
    )
    adapter = warned(folder, "adapter_model.bin", allow_pickle_weights=True)
    assert adapter.digest == plain.digest
    canary = tmp_path / "canary"
    for name, content in (
        ("rce", {"x": Bomb(str(canary))}),
        ("pair", good | {"x": Bomb(str(canary))}),
    ):
        message = refused(
            save_bin(tmp_path / name, content),
            "adapter_model.bin",
            error=AdapterSecurityError,
            allow_pickle_weights=True,
        )
        assert "weights_only" not in message
    raw = pickle.dumps(Bomb(str(canary)))
    (folder / "adapter_model.bin").write_bytes(raw)
    refused(folder, "adapter_model.bin", allow_pickle_weights=True)
    assert not canary.exists()


@needs_pickles
@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"note": "text"}, "'note'"),
        ({3: torch.ones(1)}, "key 3"),
        ({PREFIX + "x.lora_A.weight": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({PREFIX + "x.lora_A.weight": torch.ones(1).expand(2**20, 2**14)}, "more bytes"),
        ({PREFIX + "model.norm.weight": torch.ones(16)}, "norm.weight"),
    ],
)
def test_pickles_are_checked_like_safetensors(
    tmp_path: Path, extra: dict[object, object], word: str
) -> None:
    refused(save_bin(tmp_path, good_tensors() | extra), word, allow_pickle_weights=True)  # type: ignore[operator]


@needs_pickles
def test_broken_pickles(tmp_path: Path) -> None:
    path = save_bin(tmp_path, good_tensors()) / "adapter_model.bin"
    raw = path.read_bytes()
    for content in (raw[:-40], raw[: len(raw) // 2], b"", b"\x80\x02."):
        path.write_bytes(content)
        refused(tmp_path, "adapter_model.bin", allow_pickle_weights=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    refused(tmp_path, "zip bomb", error=LimitExceededError, allow_pickle_weights=True)
    save_bin(tmp_path, [1, 2])
    (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
    refused(tmp_path, "list", error=AdapterFormatError, allow_pickle_weights=True)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    folder = write(tmp_path / "snapshot")
    asked: list[tuple[str, str, str | None]] = []

    def download(repo_id: str, filename: str, *, revision: str | None, **_: object) -> str:
        asked.append((repo_id, filename, revision))
        if not (folder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    adapter = Adapter.from_hub("user/name", revision="abc")
    assert adapter.label == "name"
    assert asked == [
        ("user/name", "adapter_config.json", "abc"),
        ("user/name", "adapter_model.safetensors", "abc"),
        ("user/name", "README.md", "abc"),  # of which there is none
    ]
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match=r"user/name.*adapter_model\.safetensors"):
        Adapter.from_hub("user/name")


def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, the file is not in the cache; that is not the repository's fault."""
    import huggingface_hub
    from huggingface_hub import errors

    def answering(error: Exception) -> None:
        def download(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    answering(errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(AdapterFormatError, match=r"cannot be reached, and adapter_config\.json of"):
        Adapter.from_hub("user/name")
    answering(errors.HFValidationError("no such revision"))
    with pytest.raises(AdapterFormatError, match=r"'user/name' cannot be read at 'v9': no such"):
        Adapter.from_hub("user/name", revision="v9")


def test_nothing_heavy_is_imported() -> None:
    heavy = ("peft", "transformers", "regex", "huggingface_hub")
    code = (
        f"import sys, sapmerge.io.adapter; print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_only_two_files_are_opened(tmp_path: Path) -> None:
    code = f"""
import sys, warnings
from sapmerge.io.adapter import Adapter
Adapter.load({str(write(tmp_path / "warm"))!r}).update("model.layers.0.self_attn.q_proj")
events = []
sys.addaudithook(lambda event, args: events.append((event, str(args[0]) if args else "")))
Adapter.load({str(write(tmp_path / "x"))!r}).update("model.layers.0.self_attn.q_proj")
watched = ("open", "import", "exec", "compile", "socket")
events = [(event, arg) for event, arg in events if event.split(".")[0] in watched]
print(sorted({{(event, arg.rpartition("/")[2]) for event, arg in events}}))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        found.stdout.strip()
        == "[('open', 'adapter_config.json'), ('open', 'adapter_model.safetensors')]"
    )


# The closed world: whatever is changed, the adapter is refused by the name of it, or it reads
# differently, or it warns.
CHANGES = (
    "add tensor",
    "rename tensor",
    "drop tensor",
    "alter tensor",
    "add key",
    "drop key",
    "alter key",
)
NEUTRAL = {"inference_mode", "task_type"}
# Dropped, these mean their default, which is what they say: the file is then the same adapter.
SAME = {"bias", "target_modules", "base_model_name_or_path"} | NEUTRAL


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(CHANGES),
    st.randoms(use_true_random=False),
    st.text("abcdefgw._AB", min_size=1, max_size=12),
)
def test_closed_world(change: str, random: object, text: str) -> None:
    import random as module_of_random

    assert isinstance(random, module_of_random.Random)
    config, tensors = good_config(), good_tensors()
    plain = Adapter.from_state_dict(config, tensors)
    name = random.choice(sorted(tensors))
    key = random.choice(sorted(config))
    culprit = name
    if change == "add tensor":
        culprit = random.choice(
            [
                PREFIX + text,
                text,
                f"{name}.{text}",
                name.replace("lora_", text),
                PREFIX + text + ".weight",
            ]
        )
        if culprit in tensors:
            return
        tensors[culprit] = torch.ones(4, 4)
    elif change == "rename tensor":
        culprit = random.choice(
            [name.replace("q_proj", text), name.replace("v_proj", text), name.replace("lora", text)]
        )
        if culprit == name:
            return
        tensors = {culprit if own == name else own: value for own, value in tensors.items()}
    elif change == "drop tensor":
        del tensors[name]
        culprit = (
            name.replace("lora_A", "lora_?").replace("lora_B", "lora_?").partition(".lora_")[0]
        )
    elif change == "alter tensor":
        tensors[name] = random.choice(
            [
                tensors[name] + 1,
                tensors[name][:3],
                tensors[name].long(),
                tensors[name] * float("nan"),
                tensors[name].half(),
            ]
        )
    elif change == "add key":
        if text in config:
            return
        culprit, config[text] = text, random.choice([1, True, False, "x", {}, {"a": 1}, [0]])
    elif change == "drop key":
        culprit = key
        del config[key]
    else:
        culprit, config[key] = key, random.choice([1, True, "x", {"a": 1}, [0], -3.5, ["v_proj"]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = Adapter.from_state_dict(config, tensors)
        except SapmergeError as error:
            # A half that lost its partner is named by the partner, and a wrong r by the rank of a
            # module.
            said = str(error)
            words = [
                culprit,
                repr(culprit)[1:-1],
                *(own.removeprefix(PREFIX).split(".lora_")[0] for own in (culprit, name)),
            ]
            assert any(word in said for word in words) or (culprit == "r" and "rank" in said), (
                change,
                culprit,
                said,
            )
            return
    if any(issubclass(item.category, SapmergeWarning) for item in caught):
        return
    if change.endswith("key") and culprit in SAME:
        return
    assert found.digest != plain.digest, (change, culprit)


def test_messages_name_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "evil\x1b[31m", good_config(use_qalora=True))
    refused(folder, "evil\\x1b[31m", "adapter_config.json", "use_qalora")


def test_updates_do_not_share_memory() -> None:
    tensors: dict[str, Tensor] = good_tensors()
    adapter = Adapter.from_state_dict(good_config(), tensors)
    name = module(0, "q_proj")
    wanted = adapter.update(name).dense()
    tensors[f"{PREFIX}{name}.lora_A.weight"].zero_()
    adapter.update(name).A.zero_()
    assert torch.equal(adapter.update(name).dense(), wanted)
    config = json.loads(json.dumps(dict(adapter.config)))
    assert config["r"] == 4


@pytest.mark.parametrize("scaling", [1e-40, -3e-43, 1e-37])
@pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")
def test_a_scaling_that_float32_hardly_has(scaling: float) -> None:
    # The oracle is float64: 1e-40 has an error of 2e-5 in float32, 3e-43 one of 2e-3.
    tensors = {name: tensor * 1e18 for name, tensor in good_tensors().items()}
    adapter = Adapter.from_state_dict(good_config(lora_alpha=4 * scaling), tensors)
    for name in adapter.modules:
        b, a = (tensors[f"{PREFIX}{name}.lora_{factor}.weight"].double() for factor in "BA")
        wrong = adapter.update(name).dense().double() - scaling * b @ a
        assert torch.linalg.norm(wrong) <= 1e-6 * torch.linalg.norm(scaling * b @ a)
