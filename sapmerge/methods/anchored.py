"""Methods that ask a model and its anchors."""

from __future__ import annotations

from sapmerge.compose import Chain, MatchEnergy
from sapmerge.layer import Merger, Method, Rescaler, Scorer
from sapmerge.masks import TopFraction
from sapmerge.mergers import Mean
from sapmerge.prune import Prune
from sapmerge.rescalers import MatchNorm
from sapmerge.scorers import Taylor
from sapmerge.units import Factors, Units

__all__ = ["sap", "sap_original"]


def sap(
    density: float = 0.8,
    units: Units = Factors(),
    scorer: Scorer = Taylor(),
    rescaler: Rescaler = MatchNorm(),
    merger: Merger = Mean(),
) -> Method:
    """Semantically-Anchored Pruning: drop what the anchors' loss does not depend on, give the energy back, average.

    1. Per adapter: S = |w dL/dw| on the anchors, at base + adapter; the lowest share is set to zero.
    2. The norm that pruning took from each layer is given back.
    3. The adapters are averaged, and the norm that averaging took from the whole is given back (`MatchEnergy`).

    Args:
        density: the fraction of units kept per layer; rho of the method's description is 1 - density.
        units: what is pruned: `Factors()` (the LoRA parameters), `Directions()`, `Entries()` or `Layers()`.
        scorer: the saliency.
        rescaler: what is given back after pruning.
        merger: how the pruned adapters are combined.

    Needs anchors and a model. `sap_original` is the method to the letter.
    """
    return MatchEnergy(Chain(Prune(scorer, TopFraction(density), rescaler, units), merger))


def sap_original(density: float = 0.5) -> Method:
    """SAP to the letter: |w dL/dw| on the LoRA parameters, lowest share to zero per layer, norm matched, mean.

    Args:
        density: the fraction of LoRA parameters kept per layer.
    """
    return Chain(Prune(Taylor(), TopFraction(density), MatchNorm(), units=Factors()), Mean())
