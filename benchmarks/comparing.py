"""`sm.compare` of eight methods beside eight separate runs: open, merge, apply, evaluate.

    python benchmarks/comparing.py            # six minutes on one idle core

Equality comes first, untimed: the weights of the model with every merge in it, by their sha256, and
every metric. Then CPU seconds, separate runs before and after `compare`, on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from coefficients import right
from speed.adapters import write_adapters
from speed.shapes import MODELS, shallow
from tables import provenance, table, write
from torch import nn

import sapmerge as sm
from sapmerge.demo.data import anchor_batches, generator, load_digits, split
from sapmerge.demo.domains import DOMAINS, render
from sapmerge.demo.training import Plan, train_adapter, train_base

METHODS = ("mean", "ties", "tsv", "iso_c", "knots", "dare_ties", "sap", "ties(0.5)")
READ_ANCHORS = ("sap",)


@dataclass(frozen=True, eq=False)
class Case:
    """What is compared on.

    Args:
        title: for the table.
        adapters: folders.
        loader: of the anchors.
        model: the base.
        evaluate: model -> 1 or 0 per sample.
    """

    title: str
    adapters: Sequence[Path]
    loader: Sequence[Any]
    model: nn.Module
    evaluate: Callable[[Any], list[float]]

    def together(self, matched: bool, evaluate: Callable[[Any], Any]) -> None:
        sm.compare(
            self.adapters, METHODS, self.loader, self.model, evaluate=evaluate,
            matched=matched, progress=False,
        )  # fmt: skip

    def apart(self, matched: bool, evaluate: Callable[[Any], Any]) -> None:
        evaluate(self.model)
        for name in METHODS:
            own = sm.parse(name if "(" in name else f"{name}()")
            given = (self.loader, self.model) if name in READ_ANCHORS else ()
            for method in (own, sm.MatchEnergy(own)) if matched else (own,):
                merged = sm.merge(self.adapters, *given, method=method, progress=False)
                with merged.applied(self.model), torch.no_grad():
                    evaluate(self.model)

    def seen(self, run: Callable[[bool, Callable[[Any], Any]], None]) -> list[object]:
        """Digest of the weights and metric, of every merge in its turn."""
        found: list[object] = []

        def noted(model: nn.Module) -> list[float]:
            hasher = hashlib.sha256()
            for parameter in model.parameters():
                hasher.update(parameter.detach().numpy().data)
            found.append((hasher.hexdigest(), scores := self.evaluate(model)))
            return scores

        run(True, noted)
        return found


def demo(folder: Path) -> Case:
    """Three adapters of the demo, on the style of the fourth."""
    digits = load_digits()
    splits, plan = split(digits.labels, 32, 0), Plan()
    base = train_base(digits.take(splits.train), plan, 0, folder / "base")
    base.eval().requires_grad_(False)
    left_out, *others = DOMAINS
    for name in others:
        source = digits.take(splits.sources[name])
        train_adapter(base, source, DOMAINS[name], name, plan, 0, folder / name)
    unseen = digits.take(splits.test)
    images = render(unseen.images, DOMAINS[left_out], generator(0, "test", left_out))
    return Case(
        f"the demo: tiny CLIP, {len(others)} adapters of rank 8, 18 layers, 32 anchors, "
        f"{len(images)} test images",
        [folder / name for name in others],
        anchor_batches(digits.take(splits.anchors), 0),
        base,
        lambda model: right(model, images, unseen.labels),
    )


def clip(folder: Path, depth: int) -> Case:
    """Random adapters of the first blocks of CLIP ViT-B/32, on a random model."""
    from transformers import CLIPConfig, CLIPModel

    shapes = shallow(MODELS["ViT-B/32"], depth)
    torch.manual_seed(0)
    tower = {"num_hidden_layers": depth}
    config = CLIPConfig(text_config={**tower, "eos_token_id": 2}, vision_config=tower)
    model = CLIPModel(config).eval().requires_grad_(False)

    def batch(seed: int, count: int = 8) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 1000, (count, 9), generator=random)
        ids[:, -1] = 2
        pixels = torch.randn(count, 3, 224, 224, generator=random)
        return {"pixel_values": pixels, "input_ids": ids}

    test = batch(1)

    def nearest(model: Any) -> list[float]:
        found = model(**test).logits_per_image.argmax(-1)
        return (found == torch.arange(len(found))).double().tolist()

    return Case(
        f"CLIP ViT-B/32, {depth} of 12 blocks of both towers: 4 adapters of rank 16, "
        f"{len(shapes)} layers, 8 anchors, 8 test images",
        write_adapters(folder, shapes, 16, 4, torch.float32),
        [batch(0)],
        model,
        nearest,
    )


def cpu(run: Callable[[bool, Callable[[Any], Any]], None], case: Case, matched: bool) -> float:
    start = time.process_time()
    run(matched, case.evaluate)
    return time.process_time() - start


def measured(case: Case, repeats: int) -> list[list[object]]:
    """Rows of the table."""
    one, other = case.seen(case.together), case.seen(case.apart)
    equal = sum(a == b for a, b in zip(one, other, strict=True))
    if equal != len(one):
        raise SystemExit(f"{case.title}: {len(one) - equal} of {len(one)} merges differ")
    rows: list[list[object]] = []
    for matched in (False, True):
        before = [cpu(case.apart, case, matched)]
        ours = list[float]()
        for _ in range(repeats):
            ours.append(cpu(case.together, case, matched))
            before.append(cpu(case.apart, case, matched))
        apart, together = statistics.median(before), statistics.median(ours)
        merges = len(METHODS) * (1 + matched)
        lengths = "own and matched" if matched else "own"
        rows.append(
            [case.title, lengths, merges, f"{apart:.1f}", f"{together:.1f}",
             f"{together / apart:.2f}", f"{equal} of {len(one)}"]
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--depth", type=int, default=4, help="blocks of each tower of the CLIP")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", sm.SapmergeWarning)
    with tempfile.TemporaryDirectory() as name:
        rows = measured(demo(Path(name) / "demo"), 5)
        rows += measured(clip(Path(name) / "clip", options.depth), 1)
    head = ["on", "lengths", "merges", "separate runs, s", "`compare`, s", "ratio", "equal"]
    write(
        "comparing",
        "Comparing methods in one call",
        provenance("peft", "transformers"),
        f"`sm.compare` of eight methods ({', '.join(METHODS)}) beside separate runs from files: "
        "open, merge, apply, evaluate, take out again. CPU seconds on one thread, medians; "
        "separate runs are measured before and after. `equal`: merges whose weights and metrics "
        "are the same to the last bit, the base model among them.",
        table(head, rows),
    )


if __name__ == "__main__":
    main()
