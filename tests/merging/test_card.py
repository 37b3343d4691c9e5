"""The model card, as the Hub's own library reads and checks it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import sapmerge as sm
from sapmerge.merging.card import hub_id
from tests.models import BASE, save_lora

COMMIT = "0123456789abcdef" * 2 + "01234567"


def card(tmp_path: Path, inputs: object = None, **options: object) -> ModelCard:
    folders = [save_lora(tmp_path / "secret" / label, seed) for seed, label in enumerate("ab")]
    merged = sm.merge(inputs or folders, method=sm.ties(0.3), rank="exact", **options)  # type: ignore[arg-type]
    merged.save_pretrained(tmp_path / "out")
    return ModelCard.load(tmp_path / "out" / "README.md")


def test_the_hub_reads_what_it_asks_for(tmp_path: Path) -> None:
    found = card(tmp_path, weights=[1, 2])
    data = found.data.to_dict()
    assert data["base_model"] == BASE
    validate_repo_id(data["base_model"])
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "peft"
    assert data["tags"] == ["lora", "merge", "sapmerge"]


def test_what_was_merged(tmp_path: Path) -> None:
    found = card(tmp_path, weights=[1, 2])
    report = sm.merge(
        [tmp_path / "secret" / label for label in "ab"],
        method=sm.ties(0.3), rank="exact", weights=[1, 2],
    ).report  # fmt: skip
    for adapter in report.adapters:
        row = (
            f"| {adapter.label} | {adapter.weight:g} | {adapter.layers} | "
            f"{adapter.energy_share:.1%} | `{adapter.digest[:16]}` |"
        )
        assert row in found.text
    assert f"energy kept {report.energy_kept:.1%}" in found.text
    (block,) = re.findall(r"```json\n(.*?)\n```", found.text, re.DOTALL)
    recipe = json.loads(block)
    assert sm.parse(recipe["method"]) == sm.ties(0.3)
    assert recipe["weights"] == {"a": 1.0, "b": 2.0}
    assert (recipe["rank"], recipe["scale"]) == ("exact", 1.0)
    assert sm.__version__ in found.text


@pytest.mark.parametrize(
    "base",
    ["/home/me/models/clip", "./clip", "../clip", "C:\\models\\clip", "models/of/mine", "~/clip",
     "😀/base", 'quo"te\\back', "модель: {x}", "a # b", "- x", "a--b/c", "x/y.git"],
)  # fmt: skip
def test_a_base_that_is_no_hub_id_is_not_named(tmp_path: Path, base: str) -> None:
    found = card(tmp_path, base_model=base)
    assert "base_model" not in found.data.to_dict()
    assert "base_model_relation" not in found.data.to_dict()
    assert base not in found.content
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == base  # fmt: skip


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "clip").mkdir(parents=True)
    assert "base_model" not in card(tmp_path, base_model="my/clip").data.to_dict()


@pytest.mark.parametrize("base", ["gpt2", "openai/clip-vit-base-patch32", "a_b/c.d-e"])
def test_hub_ids_are_named(tmp_path: Path, base: str) -> None:
    validate_repo_id(base)
    assert card(tmp_path, base_model=base).data.base_model == base


def test_no_local_paths(tmp_path: Path) -> None:
    assert str(tmp_path) not in card(tmp_path).content
    assert "secret" not in (tmp_path / "out" / "README.md").read_text()


def test_adapters_from_the_hub_are_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--user--art-lora" / "snapshots" / COMMIT
    inputs = [save_lora(snapshot, 1), save_lora(tmp_path / "local", 2)]
    found = card(tmp_path, {"art": inputs[0], "mine": inputs[1]})
    link = f"[user/art-lora](https://huggingface.co/user/art-lora/tree/{COMMIT})"
    assert f"| {link} | 1 |" in found.text
    assert "| mine | 1 |" in found.text
    assert str(tmp_path) not in found.content


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("hf://user/name", ("user/name", None)),
        ("hf://user/name@v1.0", ("user/name", "v1.0")),
        ("hf://user/<b>", None),
        (f"/c/models--gpt2/snapshots/{COMMIT}", ("gpt2", COMMIT)),
        (f"/c/models--u--n/snapshots/{COMMIT}/sub", ("u/n", COMMIT)),
        ("/c/models--u--n/snapshots/main", None),
        ("user/name", None),  # a folder: an id is not guessed from a path
    ],
)
def test_where_an_adapter_is_from(source: str, wanted: tuple[str, str | None] | None) -> None:
    assert hub_id(source) == wanted


def test_a_merge_that_loses_energy_says_so(tmp_path: Path) -> None:
    folders = [save_lora(tmp_path / label, seed) for seed, label in enumerate("ab")]
    with pytest.warns(sm.SapmergeWarning, match="keeps"):
        sm.merge(folders, method=sm.dare(0.2), rank=1).save_pretrained(tmp_path / "out")
    assert "less than 90 %" in (tmp_path / "out" / "README.md").read_text()


def with_licences(tmp_path: Path, **cards: str | None) -> ModelCard:
    """The card of a merge of adapters whose own cards have these front matters."""
    folders = [save_lora(tmp_path / label, seed) for seed, label in enumerate(cards)]
    for folder, text in zip(folders, cards.values()):
        if text is not None:
            (folder / "README.md").write_text(f"---\n{text}\n---\n")
    sm.merge(folders, method=sm.mean()).save_pretrained(tmp_path / "out")
    return ModelCard.load(tmp_path / "out" / "README.md")


def test_a_licence_that_all_state(tmp_path: Path) -> None:
    found = with_licences(tmp_path / "one", a="license: mit", b="license: 'mit'")
    assert found.data.license == "mit"
    assert "The adapters' cards state the licence `mit`." in found.text
    named = "license: other\nlicense_name: llama3"
    found = with_licences(tmp_path / "other", a=named, b=named)
    assert (found.data.license, found.data.license_name) == ("other", "llama3")
    found = with_licences(
        tmp_path / "two", a="license: [mit, gpl-3.0]", b="license: [mit, gpl-3.0]"
    )
    assert found.data.license == ["mit", "gpl-3.0"]
    again = with_licences(tmp_path / "number", a="license: '1.0'", b="license: '1.0'")
    assert again.data.license == "1.0"
    # an output of ours is an input like others
    sm.merge([tmp_path / "one" / "out"], method=sm.mean()).save_pretrained(tmp_path / "again")
    assert ModelCard.load(tmp_path / "again" / "README.md").data.license == "mit"


def test_licences_that_differ(tmp_path: Path) -> None:
    found = with_licences(
        tmp_path, a="license: mit", b="license: cc-by-nc-4.0", c=None, d="license: mit"
    )
    assert "license" not in found.data.to_dict()
    assert "`cc-by-nc-4.0` (b); `mit` (a, d); none is stated for c." in found.text
    assert "is the decision of whoever does so" in found.text


def test_no_licence(tmp_path: Path) -> None:
    hostile = "license: <img src=x>"
    found = with_licences(tmp_path, a=None, b=hostile)
    assert "license" not in found.data.to_dict()
    assert "The licences of the base and of these adapters hold for the merge, too." in found.text
    assert "img" not in found.content
    assert "decision" not in found.text
