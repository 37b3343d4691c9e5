"""The report of a run, made before its effect."""

from __future__ import annotations

from sapmerge.core.part import recipe
from sapmerge.errors import warn
from sapmerge.merging.meaning import say_of_result
from sapmerge.merging.report import LayerReport, Report, describe_adapters, describe_pairs
from sapmerge.merging.run import Run

__all__ = ["report_of"]


def report_of(run: Run, layers: tuple[LayerReport, ...]) -> Report:
    """The report, before the effect: it may warn, and so raise."""
    labels = [adapter.label for adapter in run.adapters]
    layers, cosine, sign_conflict = describe_pairs(labels, layers)
    report = Report(
        method=recipe(run.method),
        base_model=run.base.name,
        scale=run.scale,
        rank=run.rank,
        adapters=describe_adapters(run.adapters, run.weights, layers),
        layers=layers,
        modules_to_save=run.heads.modules,
        dropped_modules=run.heads.dropped,
        cosine=cosine,
        sign_conflict=sign_conflict,
    )
    if report.energy_kept < 0.9:
        warn(
            f"the stored adapter keeps {report.energy_kept:.0%} of the merged update's energy: "
            f"the result is not low-rank, or too small for {run.dtype}. Use apply_to(model), "
            "which is lossless, or a larger rank, e.g. rank=0.95"
        )
    say_of_result(run.adapters, run.weights, run.method, run.scale, layers, run.said)
    return report
