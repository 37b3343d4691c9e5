"""The documentation is true: its programs run, its commands run, its table is the code's,
its links lead somewhere.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import json
import operator
import os
import pkgutil
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import sapmerge
from sapmerge import cli

from .anchors.test_loading import clip_processor
from .io.formats.test_convert import kohya, mlx

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("downloads/medical", "downloads/legal", "art", "sketch", "cartoon", "a", "b", "c")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
# Random updates are no more low-rank after pruning than a program of the documentation has to be
# quiet about it.
_rank = pytest.mark.filterwarnings("ignore:the stored adapter keeps")
# Models that are made from a config have no name.
_base = pytest.mark.filterwarnings("ignore:no adapter names its base model")


def quiet(test: Any) -> Any:
    """Both marks."""
    return _rank(_base(test))


def blocks(page: Path, languages: str) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of every fenced block of some languages, "python|sh"."""
    text = page.read_text()
    for found in re.finditer(rf"^```({languages})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start(2)].count("\n"), found[1], found[2]


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    narrow = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPModel(
        CLIPConfig(
            text_config={
                **narrow,
                "vocab_size": 64,
                "max_position_embeddings": 16,
                "eos_token_id": 2,
            },
            vision_config={**narrow, "image_size": 32, "patch_size": 16},
            projection_dim=16,
        )
    )


def with_lora(rank: int = 4) -> Any:
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = get_peft_model(tiny_clip(), config)
    peft_model.peft_config["default"].base_model_name_or_path = "somebody/clip"
    return peft_model


def processor(images: list[Any], text: list[str], **_: Any) -> dict[str, torch.Tensor]:
    """Stands in for a transformers processor: a caption is one token between two others."""
    ids = [[1, 3 + sum(map(ord, caption)) % 60, 2] for caption in text]
    pixels = [
        one if isinstance(one, torch.Tensor) else torch.tensor(list(one.tobytes())).float() / 255
        for one in images
    ]
    pixels = [one.reshape(3, 32, 32) for one in pixels]
    return {"pixel_values": torch.stack(pixels), "input_ids": torch.tensor(ids)}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters that the documentation speaks of, written by PEFT."""
    root = tmp_path_factory.mktemp("downloads")
    for number, name in enumerate(FOLDERS):
        peft_model = with_lora(rank=2 + number % 3)
        torch.manual_seed(number)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        peft_model.save_pretrained(root / name, save_embedding_layers=False)
    write_base(root / "base")
    write_photos(root / "photos")
    kohya(root / "style.safetensors")
    mlx(root / "adapters")
    return root


def write_base(folder: Path) -> None:
    """The base model with a processor, as a user has it on the disk."""
    tiny_clip().save_pretrained(folder)
    clip_processor(folder, 32).save_pretrained(folder)


def write_photos(folder: Path) -> None:
    """Images with captions."""
    folder.mkdir()
    captions = {f"{k}.png": f"thing {'abcdef'[k]}" for k in range(6)}
    for k, name in enumerate(captions):
        picture = Image.linear_gradient("L").rotate(60 * k).resize((32, 32)).convert("RGB")
        picture.save(folder / name)
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    lines = ["file_name,text", *(f"{name},{text}" for name, text in captions.items())]
    (folder / "metadata.csv").write_text("\n".join(lines))


@pytest.fixture
def workplace(downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the adapters in it."""
    folder = tmp_path / "work"
    shutil.copytree(downloads, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def names() -> dict[str, Any]:
    return given_names()


def given_names() -> dict[str, Any]:
    """What the programs of the documentation take for granted."""
    generator = torch.Generator().manual_seed(0)
    return {
        "__name__": "documentation",
        "images": list(torch.randn(8, 3, 32, 32, generator=generator)),
        "captions": [f"a picture of thing {k}" for k in range(8)],
        "processor": processor,
        "model": tiny_clip(),
        "peft_model": with_lora(),
    }


def write_modules(page: Path, folder: Path) -> None:
    """A block that begins with `# name.py` is that file."""
    for _, _, text in blocks(page, "python"):
        if found := re.match(r"# (\w+\.py)\n", text):
            (folder / found[1]).write_text(text)
            # Another page, or another test, may have had a module of this name.
            sys.modules.pop(found[1].removesuffix(".py"), None)


@quiet
@every_page
def test_pages_run_twice(
    page: Path,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Programs and commands from top to bottom, and again in the same folder, as a day later."""
    write_modules(page, workplace)
    # the command line sets its own
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for _ in range(2):
        run_page(page, capsys)


def run_page(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every program and command of a page."""
    names = given_names()
    for line, language, text in blocks(page, "python|sh"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            if language == "python":
                # The empty lines put a failure on its line in the page.
                exec(compile("\n" * line + text, str(page), "exec", dont_inherit=True), names)
                continue
            for command in text.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                if words[:1] != ["sapmerge"] or words[1:2] == ["demo"]:  # test_demo.py has that
                    continue
                with warnings.catch_warnings():
                    code = cli.main(words[1:])
                assert code == 0, f"{page.name}:{line}: {command}\n{capsys.readouterr().err}"


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links {target}"


@every_page
def test_pages_are_short_and_public(page: Path) -> None:
    text = page.read_text()
    # methods.md is a table with one row per method, and no page to read from top to bottom.
    assert page.stem == "methods" or text.count("\n") <= 200, page.name
    assert text.startswith("# ")
    assert not re.search(r"/(work|tmp|home)/|\.\./shared", text), "a path outside the repository"


def test_the_table_of_methods_is_that_of_the_code() -> None:
    """If this fails, run: python -m docs.make_methods"""
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    assert spec is not None
    assert spec.loader is not None
    make_methods = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = make_methods  # dataclasses look their module up
    spec.loader.exec_module(make_methods)
    assert (ROOT / "docs" / "methods.md").read_text() == make_methods.page()


def test_every_method_has_its_formula() -> None:
    """On the page of its family, typeset."""
    from docs import make_site

    families = dict.fromkeys(sapmerge.contrib.__all__, "contrib")
    for name in sapmerge.methods.__all__:
        families[name] = getattr(sapmerge, name).__module__.rpartition(".")[2]
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    for family, text in pages.items():
        parts = re.findall(r"^## `(\w+)`\n\n\$\$", text, re.MULTILINE)
        assert parts == re.findall(r"^## `(\w+)`", text, re.MULTILINE), family
        wanted = {name for name, home in families.items() if home == family and name.islower()}
        assert (set(parts), len(parts)) == (wanted, len(wanted)), family
        assert text.count("\n") <= 200
    if importlib.util.find_spec("latex2mathml"):
        drawn = make_site.typeset(pages["averaging"])
        assert "$" not in drawn
        assert "<mfrac><mrow><msub><mo>&#x02211;</mo><mi>k</mi></msub>" in drawn


@pytest.mark.parametrize(
    "module",
    ["sapmerge", *(found.name for found in pkgutil.walk_packages(sapmerge.__path__, "sapmerge."))],
)
def test_docstrings_run(module: str, workplace: Path, names: dict[str, Any]) -> None:
    """With a `model` and a `loader` at hand, as the programs of the pages have them."""
    if module == "sapmerge.__main__":
        pytest.skip("runs the command line")
    names["loader"] = sapmerge.anchors.from_pairs(
        names["images"], names["captions"], names["processor"], batch_size=4
    )
    result = doctest.testmod(
        importlib.import_module(module), extraglobs=names, optionflags=doctest.ELLIPSIS
    )
    assert result.failed == 0


def test_public_functions_have_an_example() -> None:
    public = {name: getattr(sapmerge, name) for name in sapmerge.__all__}
    functions = {name: thing for name, thing in public.items() if inspect.isfunction(thing)}
    assert not [name for name, thing in functions.items() if ">>> " not in (thing.__doc__ or "")]


def test_the_gallery_is_what_its_scripts_print(tmp_path: Path) -> None:
    """Twice in one folder. If this fails, run: python -m docs.make_gallery"""
    from docs import make_gallery

    scripts = sorted(make_gallery.GALLERY.glob("*.py"))
    assert len(scripts) >= 6
    for script in scripts:
        text = script.with_suffix(".md").read_text(encoding="utf-8")
        assert text == make_gallery.page(script, tmp_path)
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (script.parent / picture).exists()
    assert make_gallery.page(scripts[0], tmp_path) == scripts[0].with_suffix(".md").read_text()


def test_the_reference_has_every_public_name() -> None:
    from docs import make_site

    pages = make_site.reference()
    listed = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(listed) == len(set(listed))
    things = {id(operator.attrgetter(name.partition(".")[2])(sapmerge)) for name in listed}
    for module in (sapmerge, sapmerge.anchors, sapmerge.federated):
        for name in module.__all__:
            assert id(getattr(module, name)) in things, f"{module.__name__}.{name}"
    for name in listed:
        assert f"][{name}]" in pages["api/index.md"], name


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    from docs import make_site

    pages = {page for page in make_site.gathered() if page.endswith(".md")}
    pages = {page for page in pages if not page.startswith("benchmarks/")}
    shown = set(re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert shown == pages | set(make_site.reference())


def test_links_of_the_site_stay_on_it() -> None:
    from docs import make_site

    files = make_site.gathered()
    for page, path in files.items():
        if path.suffix == ".md":
            text = make_site.linked(path.read_text(encoding="utf-8"), page, files)
            for target in re.findall(r"\]\(([^)#\s]+)", text):
                if "://" not in target:
                    folder = page.rpartition("/")[0]
                    place = os.path.normpath(os.path.join(folder, target)).replace(os.sep, "/")
                    assert place in files, f"{page} links {target}"


def test_pages_have_no_prompts() -> None:
    """A session with >>> in a page would not be run by anything."""
    assert not [page.name for page in PAGES if ">>> " in page.read_text()]


def public_functions() -> Iterator[tuple[str, Any]]:
    for home in (sapmerge, sapmerge.anchors, sapmerge.federated):
        for name in home.__all__:
            thing = getattr(home, name)
            if inspect.isfunction(thing):
                yield name, thing
            elif inspect.isclass(thing):
                for key, method in vars(thing).items():
                    function = getattr(method, "__func__", method)
                    if inspect.isfunction(function) and not key.startswith("_"):
                        yield f"{name}.{key}", function


def test_whoever_lists_arguments_lists_all() -> None:
    missing = {}
    for name, function in public_functions():
        _, found, listed = (inspect.getdoc(function) or "").partition("Args:")
        parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
        described = set(re.findall(r"\w+", " ".join(re.findall(r"(?m)^    ([\w*, ]+):", listed))))
        if found and parameters - described:
            missing[name] = parameters - described
    assert not missing
