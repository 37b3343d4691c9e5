"""What is compared: every method of the library, SAP's own choices, and controls."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature

from torch import Tensor

import sapmerge as sm
from dg.trial import MATCHED, Contender
from sapmerge.core.part import parts
from sapmerge.parts.mergers.fisher import FisherMean
from sapmerge.parts.mergers.regmean import RegMean

__all__ = ["Contender", "contrib", "library", "main", "study", "tuned", "unequal", "without"]

ASKING = (
    sm.ExcludeOutliers,
    sm.WeighByAnchors,
    sm.ScaleByAnchors,
    sm.Tune,
    sm.FitCoefficients,
    sm.SearchCoefficients,
    sm.PruneGroups,
    sm.PruneLayers,
    FisherMean,
    RegMean,
)


def contender(
    name: str,
    method: sm.Method,
    loss: Callable[..., Tensor] = sm.alignment,
    anchors: int = 32,
    matched_only: bool = False,
) -> Contender:
    """A row; anchors are given only to methods that ask for them."""
    lengths = (MATCHED,) if matched_only else Contender.lengths
    return Contender(name, method, loss, anchors if _asks(method) else 0, lengths)


def _asks(method: sm.Method) -> bool:
    return any(
        getattr(part, "reads_gradients", False) or type(part) in ASKING for part in parts(method)
    )


def library() -> list[Contender]:
    """Every public method that needs no argument, except slerp and factor_average, which are no
    merge of K updates, and tune, which costs as much as five of them (`tuned`)."""
    found = []
    for name in sm.methods.__all__:
        factory = getattr(sm, name)
        if name in ("slerp", "factor_average", "tune") or not name.islower():
            continue
        if all(
            given.default is not Parameter.empty for given in signature(factory).parameters.values()
        ):
            found.append(contender(name, factory()))
    return found


def tuned() -> list[Contender]:
    """`sap` at the best of five densities, by a held-out half of the anchors."""
    return [contender("tune", sm.tune())]


def contrib() -> list[Contender]:
    """`sapmerge.contrib`, without what needs more than adapters and anchors (lorm a shared factor,
    movement runs).
    """
    names = (
        *("adamerging", "ctm", "emr", "gradpruner", "loraprune", "lorahub", "nsc", "pcb", "pico"),
        *("ram", "score", "spectral_surgery", "star", "tara", "wudi"),
    )
    return [contender(name, getattr(sm, name)()) for name in names]


def main() -> list[Contender]:
    """The few that tell the story."""
    names = ("mean", "task_arithmetic", "ties", "tsv", "core_space", "sap_original", "sap")
    return [contender(name, getattr(sm, name)()) for name in names]


def unequal() -> list[Contender]:
    """Methods that a server could turn to when clients differ:
    robust means, and weights from the anchors.
    """
    names = (
        "mean",
        "ties",
        "tsv",
        "iso_c",
        "coordinate_median",
        "geometric_median",
        "krum",
        "trimmed_mean",
    )
    found = [contender(name, getattr(sm, name)()) for name in (*names, "sap_original", "sap")]
    found.append(contender("mean weighed by agreement", sm.WeighByAgreement(sm.mean())))
    for temperature in (0.1, 0.3):
        method = sm.WeighByAnchors(sm.mean(), sm.contrastive, temperature)
        found.append(
            contender(f"mean weighed by contrastive / {temperature}", method, matched_only=True)
        )
    return found


def without() -> list[Contender]:
    """SAP, SAP with one of its parts left out, and with saliency."""
    kept = {
        "mean": sm.mean(),
        "sap": sm.sap(),
        "sap without the outlier test": sm.ClipNorms(sm.MatchEnergy(sm.mean())),
        "sap without clipped norms": sm.ExcludeOutliers(sm.MatchEnergy(sm.mean())),
        "sap, density 0.9": sm.sap(0.9),
    }
    return [contender(name, method) for name, method in kept.items()]


def pruned(
    scorer: sm.Scorer, density: float, units: sm.Units, rescaler: sm.Rescaler | None = None
) -> sm.Method:
    """Prune by a score, and average."""
    scope = "adapter" if isinstance(units, sm.Layers) else "layer"
    return sm.Chain(
        sm.Prune(scorer, sm.TopFraction(density, scope), rescaler or sm.MatchNorm(), units),
        sm.Mean(),
    )


def study() -> list[Contender]:
    """SAP over units, density, scorer, loss, where the gradient is taken, anchors and rescaler;
    with its controls.
    """
    found = [contender("mean", sm.mean(), matched_only=True)]

    def add(
        name: str, method: sm.Method, loss: Callable[..., Tensor] = sm.alignment, anchors: int = 32
    ) -> None:
        found.append(contender(name, method, loss, anchors, matched_only=True))

    units = {
        "factors": sm.Factors(),
        "directions": sm.Directions(),
        "entries": sm.Entries(),
        "layers": sm.Layers(),
    }
    for kind, unit in units.items():
        for density in (0.3, 0.5, 0.8):
            add(f"|w g|, {kind}, {density}", pruned(sm.Taylor(), density, unit))
            add(f"random, {kind}, {density}", pruned(sm.Random(), density, unit))
            add(f"magnitude, {kind}, {density}", pruned(sm.Magnitude(), density, unit))
    unit = sm.Factors()
    for loss in (sm.centered_alignment, sm.contrastive):
        add(f"|w g|, factors, 0.5, {loss.__name__}", pruned(sm.Taylor(), 0.5, unit), loss)
        add(f"-w g, factors, 0.5, {loss.__name__}", pruned(sm.SignedTaylor(), 0.5, unit), loss)
    add("-w g, factors, 0.5", pruned(sm.SignedTaylor(), 0.5, unit))
    add("|w| E|g|, factors, 0.5", pruned(sm.PerSampleTaylor(), 0.5, unit))
    add("Fisher, factors, 0.5", pruned(sm.SecondOrder(), 0.5, unit))
    add("|w g| at the base, factors, 0.5", pruned(sm.Taylor("base"), 0.5, unit))
    add(
        "|w g|, factors, 0.5, nothing given back per layer",
        pruned(sm.Taylor(), 0.5, unit, sm.Keep()),
    )
    for anchors in (8, 16, 128):
        add(
            f"|w g|, factors, 0.5, {anchors} anchors",
            pruned(sm.Taylor(), 0.5, unit),
            anchors=anchors,
        )
    return found
