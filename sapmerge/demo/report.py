"""What the demo found, in text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sapmerge.demo.lessons import Lesson

__all__ = ["BAD", "SUMS", "DemoResult", "average"]

BAD = "bad"
"""The client whose labels are wrong: each digit is called the next one."""
SUMS = ("task_arithmetic", "dare")
"""Methods that add updates up: of K of them the demo takes 1 / sqrt(K) of the sum."""

Accuracies = Mapping[str, float]
"""Accuracy by domain, in [0, 1]."""


@dataclass(frozen=True)
class DemoResult:
    """Accuracies, and where the files are. `str(result)` is the table.

    Args:
        output: the folder with everything that was written.
        generic: accuracy of the base model on unseen digits in the style it was trained on.
        zero_shot: of the base model on each domain.
        own: of each domain's adapter on its own domain.
        single: of one adapter of another domain, the mean over the three.
        merged: method -> accuracy of its merge of the three other adapters, on the domain left out.
        with_bad: the same with a fourth client among them, whose labels are wrong.
        lessons: what SAP does, step by step.
        anchors: how many image-text pairs the methods that read anchors saw.
        tested: how many digits each accuracy is measured on.
        seconds: of each phase.
        quick: trained for a few steps only.
    """

    output: Path
    generic: float
    zero_shot: Accuracies
    own: Accuracies
    single: Accuracies
    merged: Mapping[str, Accuracies]
    with_bad: Mapping[str, Accuracies]
    lessons: Sequence[Lesson]
    anchors: int
    tested: int
    seconds: Accuracies
    quick: bool = False

    @property
    def chart(self) -> Path:
        return self.output / "accuracy.png"

    @property
    def base(self) -> Path:
        """The base model's folder, for `CLIPModel.from_pretrained`."""
        return self.output / "base"

    @property
    def adapters(self) -> Mapping[str, Path]:
        """The folder of each domain's adapter."""
        return {domain: self.output / "adapters" / domain for domain in self.own}

    def merged_adapter(self, method: str, left_out: str, bad: bool = False) -> Path:
        """The folder of a merged adapter, with the bad client among its inputs or not."""
        name = f"without-{left_out}" + "-with-bad" * bad
        return self.output / "merged" / method / name

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, numbers and strings."""
        data: dict[str, Any] = asdict(self)
        lessons = [{"sentence": one.sentence, "picture": str(one.picture)} for one in self.lessons]
        return {**data, "output": str(self.output), "chart": str(self.chart), "lessons": lessons}

    def __str__(self) -> str:
        domains = list(self.zero_shot)
        wide = max(map(len, ("adapter of one other domain", *self.merged)))

        def row(label: str, accuracies: Accuracies) -> str:
            cells = [*(accuracies[domain] for domain in domains), average(accuracies)]
            return f"  {label:<{wide}}" + "".join(f"{100 * cell:>10.1f}" for cell in cells)

        phases = ", ".join(f"{phase} {taken:.0f}" for phase, taken in self.seconds.items())
        error = 196 * math.sqrt(0.25 / self.tested)
        steps = [
            f"{number}  {lesson.sentence}\n   {lesson.picture.name}"
            for number, lesson in enumerate(self.lessons, 1)
        ]
        return "\n".join(
            [
                *steps,
                "",
                f"Accuracy in % on {self.tested} unseen handwritten digits; base model, generic "
                f"style: {100 * self.generic:.1f}",
                "",
                f"  {'':<{wide}}" + "".join(f"{name:>10}" for name in (*domains, "average")),
                row("zero-shot", self.zero_shot),
                row("adapter of the domain", self.own),
                row("adapter of one other domain", self.single),
                "merged from the three other domains:",
                *(row(name, accuracies) for name, accuracies in self.merged.items()),
                "merged from these three and one that calls each digit the next:",
                *(row(name, accuracies) for name, accuracies in self.with_bad.items()),
                "",
                f"Every method runs with its defaults, sums of K adapters ({', '.join(SUMS)}) at "
                "1 / sqrt(K) of their",
                f"length; {self.anchors} generic image-text pairs are the anchors.",
                "This demonstrates the pipeline. It is no evidence for or against any method: one "
                "tiny model, four",
                f"made-up domains, and every number is good to about {error:.0f} points.",
                *(["Quick mode: nothing here is trained to the end."] if self.quick else []),
                "",
                f"{self.output}: chart in {self.chart.name}, adapters in adapters/ and merged/, "
                "base model in base/",
                f"{sum(self.seconds.values()):.0f} seconds ({phases})",
                "",
                "With adapters of your own:",
                "  sapmerge inspect A B C --html look.html",
                "  sapmerge merge A B C -o merged --method ties --density 0.2",
                "  sapmerge merge A B C -o merged --anchors IMAGES --model BASE",
            ]
        )


def average(accuracies: Accuracies) -> float:
    """The mean over the domains."""
    return sum(accuracies.values()) / len(accuracies)
