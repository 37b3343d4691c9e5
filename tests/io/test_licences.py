"""The licence in a model card: what huggingface_hub reads there, and nothing of what is no name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sapmerge.io.licences import licence_of

READ = (
    "license: mit",
    "license: apache-2.0  # as the base",
    "license: 'cc-by-nc-4.0'",
    'license: "openrail++"',
    "license:\n- mit\n- apache-2.0\ntags: [lora]",
    "license:\n  - mit\nbase_model: a/b",
    "license: [mit, 'gpl-3.0']",
    "base_model: a/b\nlicense: llama3.1\ntags:\n- lora",
    "license: other\nlicense_link: LICENSE",
    "tags:\n- license: mit",
    "# license: mit\ntags: [a]",
    "license_name: mine",
)


@pytest.mark.parametrize("text", READ)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_it_is_what_the_hub_reads(text: str, ends: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(f"---\n{text}\n---\n# Title\nlicense: gpl-2.0\n".replace("\n", ends).encode())
    wanted = ModelCard.load(card).data.to_dict().get("license")
    assert licence_of(tmp_path) == (", ".join(wanted) if isinstance(wanted, list) else wanted)


def test_the_name_of_another_licence(tmp_path: Path) -> None:
    text = "---\nlicense: other\nlicense_name: llama-3-community\nlicense_link: x\n---\n"
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == "other (llama-3-community)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "license: mit\n",
        "---\nlicense: mit\n",  # the front matter has no end
        " ---\nlicense: mit\n---\n",
        "---\nlicense: mit\nlicense: gpl-3.0\n---\n",
        "---\nlicense: <script>alert(1)</script>\n---\n",
        "---\nlicense: mit](http://x)\n---\n",
        "---\nlicense: mit` and more\n---\n",
        "---\nlicense: 'mit\n---\n",
        "---\nlicense: &a [*a]\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
        "---\nlicense: [mit, {a: b}]\n---\n",
        f"---\nlicense: {'m' * 65}\n---\n",
        "---\nlicense:\n---\n",
        "---\nlicense: |\n  mit\n---\n",
        "---\n" + "a: b\n" * 20_000 + "license: mit\n---\n",  # beyond what is read
    ],
)
def test_what_is_no_name_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) is None


def test_what_is_no_text(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    card = tmp_path / "README.md"
    card.write_bytes(b"---\nlicense: mit\n\xff\xfe\x00---\n---\n")
    assert licence_of(tmp_path) == "mit"
    card.unlink()
    card.mkdir()
    assert licence_of(tmp_path) is None
    card.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(card)
        assert licence_of(tmp_path) is None
