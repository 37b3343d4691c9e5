"""Writes docs/methods.md, the periodic table of merging.
From the root of the repository: python -m docs.make_methods

What a method is made of is read off the method itself; its result, its invariances and its cost are
measured on random layers; the summary, the paper and the deviations are those of its docstring.
What no code can know is written here.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sapmerge as sm
from sapmerge import contrib, methods
from sapmerge.contrib import gromov
from sapmerge.core.part import recipe
from sapmerge.parsing import CALLABLE
from tests.conftest import Anchored, LinearLoss, changed, make_layers, run

PAGE = Path(__file__).parent / "methods.md"
SHAPES = {"model.layers.0.q_proj": (89, 83), "model.layers.1.q_proj": (83, 89)}
RANKS = ((2, 3, 1, 4, 2), (3, 3, 3, 3, 3), (2, 5), (3, 3))
"""Adapters to measure a method on: the first that it takes."""

ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {}
"""Arguments of methods that have no defaults for them."""

MEASURED: dict[str, Callable[[], sm.Method]] = {
    "dc_merge": lambda: methods.dc_merge(density=0.5),  # 0.1 % of a small cover space is one entry
}
"""Methods whose defaults are degenerate on the small layers that are measured."""

EXTRAS: dict[str, tuple[Callable[[], sm.Method], str, str]] = {
    "dgsm_tefm": (gromov.dgsm_tefm, "gromov", "ot"),
}
"""Methods that need an extra: the function, the extra, and what it installs. Without it, what is
measured of them stays as it is on the page."""

NOTES: dict[str, str] = {
    "sap": "prunes nothing by default; `sap_original` is the method to the letter",
    "sap_original": "scores are taken on balanced factors, so that they do not depend on how the "
    "product is split",
    "task_arithmetic": "the coefficient of the paper is `scale=` of `merge`",
    "magnitude_prune": "sums, as PEFT's method of this name does, but on the update, not on A and "
    "B apart",
    "dare_ties": "as `dare` and `ties`",
}
"""Where we deviate, for methods whose docstring does not say it after `Source:`."""

HEAD = """# Methods

One row per method: what it is made of, and what follows from that. Every method is made of the
same primitives, so empty cells can be filled: `In(CoreSpace(), ...)` gives a row another basis,
`MatchEnergy(...)` another norm, a function of yours another scorer. [Your own
criterion](criteria.md) shows how.

Formulas: [averages and medians](methods/averaging.md), [pruning](methods/pruning.md), [shared
spaces](methods/shared_space.md), [spectra](methods/spectral.md), [factors](methods/lora_native.md),
[anchors](methods/anchored.md), [contrib](methods/contrib.md).

This page is written by `python -m docs.make_methods`: the composition is read off the code, and
*result*, *invariant to* and *forms* are measured on random layers. A test fails when it is out of
date.

* **units, scorer, mask, rescaler**: how `Prune` shortens each update; "-" if nothing is pruned.
* **transform**: what compares adapters before they are combined. **merger**: how they are
  combined.
* **around**: bases (`In`) and wrappers, outermost first.
* **data**: "anchors" if the method reads gradients or losses, so that `merge` needs
  `anchor_loader` and `model`.
* **result**: the rank of the merged update: `max r` or `sum r` of the inputs' ranks, or full.
  `apply_to` is exact for all; `save_pretrained` is exact up to `sum r`, and truncates what is full
  unless `rank=` says otherwise.
* **invariant to**: *factors*: (B R⁻¹, R A) is the same adapter as (B, A); *rotations* of the input
  and output space; *order* of the adapters; *scale* f(cD) = c f(D); *sign* f(-D) = -f(D). With
  anchors: at given gradients.
* **forms**: the largest thing held per layer: `m x n` matrices, or only `thin` ones, of the size
  of the factors.

"(contrib)" is a method of narrower use, and "extra `gromov`" what it needs installed:
`pip install ".[gromov]"`.
"""

SITUATIONS = """
## Which method for which situation

What follows says what a method is made for. How all of them did on domains that nobody trained on,
in one test bed, stands in [evidence](evidence.md); the numbers of papers cannot be compared with
each other (other checkpoints, other metrics, scales searched on validation data or not). Where
accuracy matters, try several on data that you held out.

Others have compared methods that were not theirs, and their verdicts are cooler than the papers'
own:
"""

VERDICTS: tuple[tuple[str, str, str], ...] = (
    (
        "`ties`, `model_stock`, `tsv`, `iso_c`, `subspace_boosting`",
        "less interference, and gains over task arithmetic",
        "[2511.21437](https://arxiv.org/abs/2511.21437), four language models of 3 to 8 B, twelve "
        "checkpoints each, sixteen benchmarks: task arithmetic alone yields gains reliably; the "
        "others typically bring none over the base",
    ),
    (
        "`task_arithmetic`, `ties`, `dare`, `consensus_ta`, `fisher`, `regmean` and others",
        "one model for all tasks without joint training",
        "[MergeBench](https://arxiv.org/abs/2505.10833), Llama and Gemma of 2 to 9 B, eight "
        "methods: better on stronger bases; tuned coefficients and sparse updates keep more of "
        "what the base knew; a gap to multi-task models remains",
    ),
    (
        "Those that fit coefficients on data, as `lorahub`, `adamerging` and `tara` do",
        "transfer from the adapters that are merged",
        "[2602.12323](https://arxiv.org/abs/2602.12323), nearly a thousand adapters of Llama 3.1 "
        "8B as people uploaded them: better than the base, of limited benefit over a new LoRA on "
        "the same data; which adapters are taken matters little, and random ones do about as well, "
        "unless highly relevant ones are among them",
    ),
    (
        "`score`, `pico`, `wudi`",
        "gains over the methods before them",
        "ours, two seeds of PACS, with code before this: none beat the energy-matched mean. All "
        "methods in one bed: [evidence](evidence.md)",
    ),
    (
        "`tara`, `nsc`, `lorahub`, `spectral_surgery`, `star`",
        "gains over the merges before them",
        "ours, digits in four styles, one seed of training, all at one length: none above the mean "
        "by its interval over images, `tara`, `nsc` and `lorahub` below it "
        "([table](../benchmarks/results/coefficients.md))",
    ),
)
"""Methods, what their authors claim, and what others found."""

LEFT_OUT = """
## Not here, and why

* RegMean++ takes RegMean's inputs from the merged model, round after round. With anchors that all
  adapters share, these are the same for all of them, and RegMean with one Gram matrix is `mean`.
  IterIS pairs them with each adapter's own outputs, which takes two models at once on every batch.
* AdaRank learns binary masks of singular directions by a training loop with straight-through
  gradients. `tara` has coefficients in [0, 1] in their place.
* CAT (LoRA soups) is `adamerging("layer", loss)` with a loss on examples of the task.
* ASCC (mirror axes) and AuthorFeedback hold nothing about merging that could be carried over.
* Tangent merging is `mean`: at the base the first-order model of an adapter is linear in its
  update.
"""

INDEX: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("You want the plain answer, exact and stored without loss", ("mean", "task_arithmetic")),
    (
        "Adapters for different tasks disagree in sign",
        ("ties", "dare_ties", "della", "sce", "pcb", "consensus_ta"),
    ),
    (
        "You want to subtract what an adapter does: `task_arithmetic` with a negative weight",
        ("task_arithmetic",),
    ),
    ("Two checkpoints of one model, interpolated along the arc", ("slerp",)),
    ("Adapters of one task, trained apart", ("mean", "model_stock", "geometric_median")),
    (
        "Some adapters may be broken or hostile",
        ("WeighByAgreement", "geometric_median", "coordinate_median", "trimmed_mean"),
    ),
    ("The one adapter that is nearest to the others: of few clients no merge", ("krum",)),
    ("One adapter is far louder than the others: a wrapper", ("ClipNorms", "CapShare")),
    (
        "Updates that barely share a subspace",
        ("knots", "core_space", "tsv", "iso_c", "iso_cts", "cart", "dc_merge", "score", "pico"),
    ),
    ("Some may be broken, and you have anchors", ("sap", "ExcludeOutliers")),
    (
        "A result of the inputs' rank, without truncation at the end",
        ("ctm", "lora_lego", "factor_average"),
    ),
    ("Factors matched rank by rank", ("robustmerge", "lora_lego")),
    ("The update closest to every adapter on the inputs that it reads", ("regmean",)),
    ("The largest entries that agree, without an average", ("emr",)),
    ("Early layers should change less: a wrapper on any method", ("lines",)),
    (
        "The result is too weak, or methods are compared: a wrapper that restores the norm",
        ("MatchEnergy",),
    ),
    ("The result is too weak or too strong, and you have anchors: a wrapper", ("ScaleByAnchors",)),
    ("You have a few image-text pairs and the model", ("sap", "sap_original")),
    ("You have data of the tasks and the model", ("fisher", "regmean", "lorm", "adamerging")),
    (
        "Coefficients fitted on a few examples, with and without gradients",
        ("adamerging", "tara", "nsc", "lorahub", "tune"),
    ),
    (
        "One adapter refined, or each before the mean: fewer, or other, singular values",
        ("spectral_surgery", "star"),
    ),
    ("Whole weights that were changed in few entries", ("ram",)),
    ("Bases that do not correspond", ("dgsm_tefm",)),
    (
        "A federated server, one adapter per client, a public set of pairs",
        ("mean", "sap", "geometric_median"),
    ),
    (
        "You need to reproduce an averaging of A and B apart (FedAvg on factors, PEFT `linear`)",
        ("factor_average",),
    ),
)


@dataclass
class Row:
    """One method, taken apart."""

    name: str
    method: sm.Method
    docstring: str
    contributed: bool
    extra: str = ""
    units: list[str] = field(default_factory=list)
    scorer: list[str] = field(default_factory=list)
    mask: list[str] = field(default_factory=list)
    rescaler: list[str] = field(default_factory=list)
    transform: list[str] = field(default_factory=list)
    merger: list[str] = field(default_factory=list)
    around: list[str] = field(default_factory=list)

    def take_apart(self, method: Any) -> None:
        """Follow the composition from the outside to the merger."""
        if isinstance(method, sm.Chain):
            for step in method.steps[:-1]:
                if isinstance(step, sm.Prune):
                    for place in ("units", "scorer", "mask", "rescaler"):
                        getattr(self, place).append(short(getattr(step, place)))
                else:
                    self.transform.append(short(step))
            self.take_apart(method.steps[-1])
        elif isinstance(method, sm.In):
            self.around.append(f"In({short(method.basis)})")
            self.take_apart(method.method)
        elif is_dataclass(method) and callable(inner := getattr(method, "method", None)):
            self.around.append(short(method, without=("method",)))
            self.take_apart(inner)
        else:
            self.merger.append(short(method))


def rows() -> list[Row]:
    """Every public method, those of `sapmerge.methods` first."""
    found: list[Row] = []
    for package in (methods, contrib):
        for name in getattr(package, "__all__", ()):
            factory = getattr(package, name)
            if not inspect.isfunction(factory):
                continue
            method = factory(**ARGUMENTS.get(name, dict)())
            row = Row(name, method, inspect.getdoc(factory) or "", package is contrib)
            row.take_apart(method)
            found.append(row)
    for name, (factory, extra, _) in EXTRAS.items():
        row = Row(name, factory(), inspect.getdoc(factory) or "", True, extra)
        row.take_apart(row.method)
        found.append(row)
    return found


def facts_of(row: Row) -> Facts:
    """What is measured of a method; of one whose extra is not installed, what the page says."""
    if row.extra and importlib.util.find_spec(EXTRAS[row.name][2]) is None:
        lines = PAGE.read_text().splitlines()
        cells = [line.split(" | ") for line in lines if line.startswith(f"| `{row.name}` | ")]
        data, result, held, forms = cells[-1][1:5]
        return Facts(data, result, () if held == "-" else tuple(held.split(", ")), forms)
    return measure(MEASURED.get(row.name, lambda: row.method)())


def short(part: Any, without: Sequence[str] = ()) -> str:
    """A part as one would write it: arguments that are the defaults are left out,
    and empty parentheses too.
    """
    if not is_dataclass(part) or isinstance(part, type):
        return recipe(part).strip("'").rpartition(":")[2]
    shown: list[str] = []
    for number, entry in enumerate(f for f in fields(part) if f.repr and f.name not in without):
        value = getattr(part, entry.name)
        if entry.default is not MISSING and value == entry.default:
            continue
        if entry.default_factory is not MISSING and value == entry.default_factory():
            continue
        text = (
            f"{value:.6g}"
            if isinstance(value, float)
            else short(value)
            if is_dataclass(value)
            else recipe(value)
        )
        text = text if len(text) <= 60 else "..."  # a method inside a method: see its own row
        shown.append(text if number == len(shown) else f"{entry.name}={text}")
    name = type(part).__name__
    return f"{name}({', '.join(shown)})" if shown else name


class _Largest(TorchDispatchMode):
    """Watches the size of the largest matrix of numbers that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


@dataclass(frozen=True)
class Facts:
    """What is measured of a method."""

    data: str
    result: str
    invariances: tuple[str, ...]
    forms: str


def measure(method: sm.Method) -> Facts:
    """Run a method on random layers, and on the same layers seen otherwise."""
    layers = next(
        (found for ranks in RANKS if _takes(method, found := make_layers(ranks, SHAPES))), None
    )
    if layers is None:
        return Facts("anchors", "not measured", (), "not measured")
    try:
        sm.prepare(method, layers)
        data = "-"
    except sm.SapmergeError:
        data = "anchors"
    got = run(method, layers)
    ranks = [update.rank for update in layers[0]]
    rank = max(int(torch.linalg.matrix_rank(update.dense(), rtol=1e-9)) for update in got.values())
    result = "max r" if rank <= max(ranks) else "sum r" if rank <= sum(ranks) else "full"
    held = tuple(name for name, holds in _invariances(method, layers, got, data) if holds)
    return Facts(data, result, held, _forms(method, layers, data))


def _takes(method: sm.Method, layers: list[sm.Layer]) -> bool:
    try:
        run(method, layers)
    except (
        sm.SapmergeError,
        NotImplementedError,
    ):  # or it needs more of a model than there is here
        return False
    return True


def _invariances(
    method: sm.Method, layers: list[sm.Layer], got: dict[str, sm.Update], data: str
) -> Iterator[tuple[str, bool]]:
    def same(
        others: list[sm.Layer], back: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, x: x
    ) -> bool:
        other = run(method, others)
        size = sum(float(update.dense().square().sum()) for update in got.values())
        gaps = [back(name, other[name].dense()) - update.dense() for name, update in got.items()]
        return sum(float(gap.square().sum()) for gap in gaps) <= 1e-14 * size

    def change(function: Callable[[sm.LowRank, sm.Layer, int], sm.LowRank]) -> list[sm.Layer]:
        return [
            changed(x, updates=tuple(function(u, x, k) for k, u in enumerate(x))) for x in layers
        ]

    generator = torch.Generator().manual_seed(7)

    def random(size: int) -> torch.Tensor:
        return torch.randn(size, size, generator=generator, dtype=torch.float64)

    def regauged(update: sm.LowRank, _: sm.Layer, k: int) -> sm.LowRank:
        R = (random(update.rank) + 3 * torch.eye(update.rank)) * 10.0 ** (k - 1)
        return sm.LowRank(torch.linalg.solve(R, update.B, left=False), R @ update.A)

    yield "factors", same(change(regauged))
    turns = {x.name: tuple(torch.linalg.qr(random(size))[0] for size in x.shape) for x in layers}
    if data == "-":
        turned = change(
            lambda u, x, _: sm.LowRank(turns[x.name][0] @ u.B, u.A @ turns[x.name][1].T)
        )
        yield "rotations", same(turned, lambda name, x: turns[name][0].T @ x @ turns[name][1])
    order = [(k + 1) % len(layers[0]) for k in range(len(layers[0]))]
    yield (
        "order",
        same([x.with_members(x.members[k] for k in order) for x in layers]),
    )
    yield "scale", same(change(lambda u, *_: u.scaled(3.0)), lambda _, x: x / 3)
    yield "sign", same(change(lambda u, *_: u.scaled(-1.0)), lambda _, x: -x)


def _forms(method: sm.Method, layers: list[sm.Layer], data: str) -> str:
    """What a merge holds. The stand-in for anchors forms matrices itself,
    so there only the merge is looked at.
    """
    prepared = sm.prepare(method, Anchored(layers, LinearLoss(layers)))
    with _Largest() as watch:
        if data == "-":
            prepared = sm.prepare(method, layers)
        for layer in layers:
            prepared(layer)
    m, n = layers[0].shape
    return "m x n" if watch.numel >= 0.8 * m * n else "thin"


def papers(docstring: str) -> str:
    """The papers that a docstring names, as links; where it names none, its other sources."""
    found = dict.fromkeys(re.findall(r"https://arxiv\.org/abs/(\d{4}\.\d{4,5})", docstring))
    other = dict.fromkeys(re.findall(r"https://github\.com/[\w./-]*\w", docstring))
    links = [f"[{name}](https://arxiv.org/abs/{name})" for name in found] or [
        f"[code]({url})" for url in other
    ]
    return ", ".join(links) or "-"


def deviation(row: Row) -> str:
    """What the docstring says after its source: where we differ, and why."""
    if row.name in NOTES:
        return NOTES[row.name]
    paragraphs = [" ".join(text.split()) for text in row.docstring.split("\n\n")]
    found: list[str] = []
    for text in paragraphs:
        if text.startswith("Source:"):
            _, _, rest = re.sub(r"https://\S*?(?=[.;,)]*(?:\s|$))", "\0", text).rpartition("\0")
            found.append(rest.lstrip(".;,) ") if "https://" in text else "")
        elif re.match(r"(Deviations?|Differs|Where we differ|We differ)\b", text):
            found.append(re.sub(r"^(Deviations?|Where we differ)[:.]?\s*", "", text))
    return " ".join(filter(None, found))


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for line in body:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


def _code(entries: Sequence[str]) -> str:
    return " then ".join(f"`{entry}`" for entry in entries) or "-"


def page() -> str:
    """The text of docs/methods.md."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.SapmergeWarning)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = rows()
            facts = {row.name: facts_of(row) for row in found}
        finally:
            torch.set_num_threads(threads)
    lines = [HEAD, *_tables(found, facts), SITUATIONS.rstrip("\n"), ""]
    lines += _table(["methods", "their authors claim", "others found"], VERDICTS)
    lines += [""]
    public = {row.name for row in found} | set(sm.__all__)
    index = [(what, [name for name in names if name in public]) for what, names in INDEX]
    lines += _table(
        ["situation", "look at"],
        [[what, ", ".join(f"`{n}`" for n in ns)] for what, ns in index if ns],
    )
    return "\n".join([*lines, LEFT_OUT.rstrip("\n"), *_parts()]) + "\n"


def _kind(row: Row) -> str:
    extra = f", extra `{row.extra}`" if row.extra else ""
    return f" (contrib{extra})" if row.contributed else ""


def _tables(found: Sequence[Row], facts: dict[str, Facts]) -> Iterator[str]:
    head = ["method", "around", "units", "scorer", "mask", "rescaler", "transform", "merger"]
    yield "## What it is made of, with default arguments\n"
    yield from _table(
        head,
        [
            [
                f"`{row.name}`" + _kind(row),
                *(_code(getattr(row, place)) for place in head[1:]),
            ]
            for row in found
        ],
    )
    yield "\n## What follows from that\n"
    yield from _table(
        ["method", "data", "result", "invariant to", "forms", "paper"],
        [
            [
                f"`{row.name}`",
                facts[row.name].data,
                facts[row.name].result,
                ", ".join(facts[row.name].invariances) or "-",
                facts[row.name].forms,
                papers(row.docstring),
            ]
            for row in found
        ],
    )
    yield "\n## In one line, and where we deviate\n"
    for row in found:
        first = " ".join(row.docstring.split("\n\n")[0].split())
        rest = deviation(row)
        yield f"* `{row.name}`: {first}" + (
            f" *Deviation:* {rest[0].lower() + rest[1:]}" if rest else ""
        )


def _parts() -> Iterator[str]:
    """Every public part that is no method, by the file that it is in."""
    files: dict[str, list[str]] = {}
    named = {name for package in (methods, contrib) for name in package.__all__}
    for name in sorted(
        CALLABLE.keys() - {name for name in named if inspect.isfunction(getattr(sm, name))}
    ):
        files.setdefault(getattr(sm, name).__module__, []).append(name)
    yield "\n## All parts\n"
    yield (
        "What a recipe may call besides the methods, by file. "
        "`help(sm.TopFraction)` tells the arguments of one."
    )
    for module in sorted(files):
        yield f"\n`{module.replace('.', '/')}.py`\n"
        for name in files[module]:
            text = inspect.getdoc(getattr(sm, name)) or ""
            yield f"* `{name}`: {' '.join(text.split(chr(10) * 2)[0].split())}"


if __name__ == "__main__":
    PAGE.write_text(page())
