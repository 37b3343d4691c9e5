"""Builds the site: pip install -e ".[docs]" && python -m docs.make_site [--serve]

The pages are those of docs/, the README as home, and what lies beside them in the repository; the
reference has every public name. They are gathered in build/pages, where links lead from page to
page, and Zensical makes build/site of them.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"

OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "examples/flower/README.md": "flower.md",
    "LICENSE": "license.md",
}
"""Files of the repository that are pages of the site, too."""

NAMESPACES = ("sapmerge", "sapmerge.anchors", "sapmerge.federated", "sapmerge.evaluation")

SECTIONS = {
    "merging": ("Merging", "sapmerge.merging sapmerge.io sapmerge.parsing sapmerge.version"),
    "methods": ("Methods", "sapmerge.methods"),
    "contrib": ("Methods of sapmerge.contrib", "sapmerge.contrib"),
    "parts": ("Primitives", "sapmerge.parts"),
    "core": ("Updates, layers, protocols", "sapmerge.core"),
    "anchors": ("Anchors and losses", "sapmerge.anchors sapmerge.losses"),
    "federated": ("Federated rounds", "sapmerge.federated"),
    "routing": ("Routing", "sapmerge.routing"),
    "comparing": ("Comparing methods", "sapmerge.comparing"),
    "evaluation": ("Accuracies with intervals", "sapmerge.evaluation"),
    "errors": ("Errors and warnings", "sapmerge.errors"),
    "others": ("Others", "sapmerge"),
}
"""Page of the reference -> its title, and the modules whose names it has."""


def public_names() -> Iterator[tuple[str, str]]:
    """(name as users write it, module that defines it); each thing once."""
    seen = set[int]()
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        for name in module.__all__:
            thing = getattr(module, name)
            home = getattr(thing, "__module__", None) or ""
            if not home.startswith("sapmerge"):  # an alias of types, or a constant
                home = "sapmerge.version" if name.startswith("__") else "sapmerge.core.protocols"
            if callable(thing) and id(thing) in seen:
                continue
            seen.add(id(thing))
            yield f"{namespace}.{name}", home


def section_of(name: str, home: str) -> str:
    """The page that a name is on."""
    if name.count(".") > 1:  # of sapmerge.anchors, for one
        return name.split(".")[1]
    return next(
        page
        for page, (_, modules) in SECTIONS.items()
        if any(home == module or home.startswith(f"{module}.") for module in modules.split())
    )


def reference() -> dict[str, str]:
    """The pages of the reference."""
    listed = defaultdict[str, list[str]](list)
    for name, home in public_names():
        listed[section_of(name, home)].append(name)
    pages = {
        f"api/{page}.md": f"# {SECTIONS[page][0]}\n\n"
        + "\n".join(f"::: {name}\n" for name in names)
        for page, names in listed.items()
    }
    links = "\n".join(
        f"* [{title}]({page}.md): "
        + ", ".join(f"[{name.rpartition('.')[2]}][{name}]" for name in listed[page])
        for page, (title, _) in SECTIONS.items()
        if page in listed
    )
    head = "# Reference\n\nEvery public name, from its docstring. `import sapmerge as sm`.\n\n"
    return {**pages, "api/index.md": head + links + "\n"}


def gathered() -> dict[str, Path]:
    """Page of the site -> file of the repository."""
    docs = {path.relative_to(ROOT / "docs").as_posix(): path for path in sources()}
    outside = {page: ROOT / path for path, page in OUTSIDE.items() if (ROOT / path).exists()}
    results = {
        f"benchmarks/{path.name}": path for path in (ROOT / "benchmarks" / "results").glob("*.md")
    }
    return {**docs, **outside, **results}


def sources() -> Iterator[Path]:
    """The pages of docs/, and their pictures."""
    for ending in ("md", "png", "svg", "html"):
        yield from sorted((ROOT / "docs").rglob(f"*.{ending}"))


def linked(text: str, page: str, files: dict[str, Path]) -> str:
    """A page whose links lead to other pages of the site. What is no page (a folder, a script) is
    named without a link.
    """
    pages = {path.resolve(): target for target, path in files.items()}
    here = files[page].parent
    up = "../" * page.count("/")

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        if label.startswith("!") and "://" in target:
            return ""  # a badge: the site loads nothing from elsewhere
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        place = pages.get((here / target).resolve())
        return f"{label}({up}{place}{anchor})" if place else label.lstrip("!").strip("[]")

    return re.sub(r"(!?\[[^\]]*\])\(([^)#\s]+)(#[^)]*)?\)", link, text)


def typeset(text: str) -> str:
    """A page whose formulas are MathML, which browsers draw by themselves: no script, no fonts from
    elsewhere. In the repository they are LaTeX between dollars, which GitHub draws.
    """
    from latex2mathml.converter import convert

    def block(found: re.Match[str]) -> str:
        return f'<div class="formula">{convert(found[1].strip(), display="block")}</div>'

    text = re.sub(r"\$\$(.+?)\$\$", block, text, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+)\$", lambda found: f"<span>{convert(found[1])}</span>", text)


def gather() -> None:
    """Write all pages into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    files = gathered()
    for page, path in files.items():
        target = PAGES / page
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            if page.startswith("methods/"):
                text = typeset(text)
            if path.name == "LICENSE":
                text = f"# License\n\n```\n{text}```\n"
            target.write_text(linked(text, page, files), encoding="utf-8")
        else:
            shutil.copyfile(path, target)
    for page, text in reference().items():
        target = PAGES / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the site into build/site.")
    parser.add_argument("--serve", action="store_true", help="show it, and build again on changes")
    options = parser.parse_args()
    gather()
    command = ["serve"] if options.serve else ["build", "--clean", "--strict"]
    return subprocess.call([sys.executable, "-m", "zensical", *command], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
