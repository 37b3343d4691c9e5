"""Methods that change singular values or fit coefficients, beside the mean of the same length, on
the demo's digits: each of four styles left out in turn.

    python benchmarks/coefficients.py --seeds 2

Two minutes per seed on two idle cores; writes benchmarks/results/coefficients.md.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sapmerge as sm
from sapmerge.demo.data import CLASSES, anchor_batches, captions, generator, load_digits, split
from sapmerge.demo.domains import DOMAINS, render
from sapmerge.demo.training import Plan, train_adapter, train_base

RESULT = Path(__file__).parent / "results" / "coefficients.md"
METHODS = {
    "mean": sm.mean(),
    "adamerging": sm.adamerging(),
    "tara": sm.tara(),
    "nsc": sm.nsc(),
    "lorahub": sm.lorahub(),
    "spectral_surgery": sm.spectral_surgery(),
    "star": sm.star(),
    "subspace_boosting": sm.subspace_boosting(),
}
"""All at the mean length of the adapters (`MatchEnergy`)."""


def right(model: Any, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """1 for each image whose nearest caption is its own."""
    prompts = captions(range(len(CLASSES)), [0] * len(CLASSES))
    with torch.no_grad():
        guesses = [
            model(pixel_values=images[k : k + 200], **prompts).logits_per_image.argmax(1)
            for k in range(0, len(images), 200)
        ]
    return (torch.cat(guesses) == labels).double().tolist()


def measured(seed: int, folder: Path, plan: Plan) -> dict[str, list[float]]:
    """Method -> 1 or 0 for every test image in every style, that style left out."""
    digits = load_digits()
    splits = split(digits.labels, 32, 0)  # the same images after every seed
    anchors = anchor_batches(digits.take(splits.anchors), 0)
    unseen = digits.take(splits.test)
    if (folder / "base").is_dir():  # from a run that was interrupted
        from transformers import CLIPModel

        base = CLIPModel.from_pretrained(folder / "base").eval().requires_grad_(False)
    else:
        base = train_base(digits.take(splits.train), plan, seed, folder / "base")
    paths = {name: folder / name for name in DOMAINS}
    for name, style in DOMAINS.items():
        if paths[name].is_dir():
            continue
        train_adapter(base, digits.take(splits.sources[name]), style, name, plan, seed, paths[name])
    found: dict[str, list[float]] = {"base": []} | {name: [] for name in METHODS}
    for left_out, style in DOMAINS.items():
        images = render(unseen.images, style, generator(0, "test", left_out))
        found["base"] += right(base, images, unseen.labels)
        sources = {name: path for name, path in paths.items() if name != left_out}
        for name, method in METHODS.items():
            model = copy.deepcopy(base)
            asks = name in ("adamerging", "tara", "nsc", "lorahub", "spectral_surgery")
            given = (anchors, base) if asks else ()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sm.SapmergeWarning)
                merged = sm.merge(sources, *given, method=sm.MatchEnergy(method), progress=False)
                merged.apply_to(model)
            found[name] += right(model, images, unseen.labels)
        print(
            seed, left_out, {k: round(float(np.mean(v)), 3) for k, v in found.items()}, flush=True
        )
    return found


def page(tables: dict[str, np.ndarray[Any, Any]]) -> str:
    seeds, images = tables["mean"].shape
    lines = [
        "# Coefficients and singular values",
        "",
        "```sh",
        f"python benchmarks/coefficients.py --seeds {seeds} --folder FOLDER",
        "```",
        "",
        f"Digits in four styles, each left out in turn; {images // len(DOMAINS)} test images per "
        f"style, seeds of training: {seeds}. All merges at the mean length of the adapters; "
        "coefficients are fitted on 32 anchors by their own loss, `alignment`. Accuracy in per "
        "cent; the difference to the mean with its 95 % interval over seeds and images. One seed "
        "says nothing about others.",
        "",
        "| method | accuracy on the style left out | minus that of the mean |",
        "|---|---|---|",
    ]
    for name, table in tables.items():
        gap = sm.evaluation.paired(100 * table, 100 * tables["mean"])
        shown = "-" if name == "mean" else f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
        label = "the base alone" if name == "base" else f"`{name}`"
        lines.append(f"| {label} | {100 * table.mean():.1f} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, required=True, help="of the adapters; a run goes on in it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in range(options.seeds):
        folder = options.folder / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        found.append(measured(seed, folder, Plan()))
    tables = {name: np.array([each[name] for each in found]) for name in found[0]}
    RESULT.write_text(page(tables))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
