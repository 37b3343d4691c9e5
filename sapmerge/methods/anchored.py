"""Methods that ask a model and its anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from sapmerge.core.part import recipe
from sapmerge.core.protocols import Merger, Method, Rescaler, Scorer, Units
from sapmerge.parts.masks import TopFraction
from sapmerge.parts.mergers.fisher import FisherMean
from sapmerge.parts.mergers.linear import Mean
from sapmerge.parts.mergers.regmean import RegMean
from sapmerge.parts.outliers import ClipNorms, ExcludeOutliers
from sapmerge.parts.prune import Prune
from sapmerge.parts.rescalers import MatchNorm
from sapmerge.parts.scaling import MatchEnergy
from sapmerge.parts.scorers import Taylor
from sapmerge.parts.tuning import Tune
from sapmerge.parts.units import Factors, Layers
from sapmerge.parts.wrappers import Chain

__all__ = ["fisher", "regmean", "sap", "sap_original", "tune"]


def sap(
    density: float = 1.0,
    units: Units = Factors(),
    scorer: Scorer = Taylor(),
    rescaler: Rescaler = MatchNorm(),
    merger: Merger = Mean(),
) -> Method:
    """SAP's default: the energy-matched mean, without outliers.

    1. An adapter whose norm is more than twice the median is scaled down to that (`ClipNorms`); one
       that is opposed to the others is left out, and one that shares next to nothing with them and
       has a higher anchor loss (`ExcludeOutliers`).
    2. With `density` below 1, per adapter: S = |w dL/dw| on the anchors, at base + adapter; the
       lowest share is set to zero, and the norm that this took from each layer is given back.
    3. The adapters are averaged, and the result has the mean norm of its inputs (`MatchEnergy`).

    Args:
        density: the fraction of units kept per layer; rho of the method's description is 1 -
            density. At 1 nothing is pruned and no gradient is taken: the anchors are only looked
            at, once per adapter.
        units: what is pruned: `Factors()` (the LoRA parameters), `Directions()`, `Entries()` or
            `Layers()`.
        scorer: the saliency.
        rescaler: what is given back after pruning.
        merger: how the adapters are combined.

    Where nobody is an outlier it is `MatchEnergy(mean())`: pruning, weights by agreement or by
    anchors, `Decorrelate` and lengths by anchors won nothing among equal adapters on domains that
    they were not chosen on, and are not part of the default (docs/evidence.md).
    Needs anchors and a model. `sap_original` is the method to the letter.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=sm.sap())
    """
    scope = "adapter" if isinstance(units, Layers) else "layer"  # a layer holds one unit: itself
    pruning = () if density == 1 else (Prune(scorer, TopFraction(density, scope), rescaler, units),)
    return ClipNorms(ExcludeOutliers(MatchEnergy(Chain(*pruning, merger))))


def sap_original(density: float = 0.5) -> Method:
    """SAP to the letter: |w dL/dw| on the LoRA parameters, lowest share to zero per layer,
    norm matched, mean.

    Args:
        density: the fraction of LoRA parameters kept per layer.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.sap_original()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)
    """
    return Chain(Prune(Taylor(), TopFraction(density), MatchNorm(), units=Factors()), Mean())


def fisher(
    floor: float = 1e-6, square: Literal["sample", "batch"] = "sample", normalize: bool = False
) -> Method:
    """Fisher merging: in every entry the mean of the adapters,
    each weighed by how much its own loss depends on it.

        D = sum_k w_k F_k D_k / sum_k |w_k| F_k,    F_k = E[(dL/dW)^2] at base + adapter k

    Args:
        floor: added to F, as a share of its mean over the layer and the adapters.
        square: "sample" squares the gradient of every anchor, which is the diagonal Fisher; "batch"
            that of every batch, summed, as MergeLM's code does (with batches of one sample they are
            the same).
        normalize: divide F_k by its norm over the whole adapter.
            MergeLM does by default; the paper does not.

    Needs anchors and a model; the result is dense. F is that of the loss of the anchors, which all
    adapters share: the paper takes each model's own predictions on its own data. MergeLM adds an
    absolute 1e-6 to F, which for small gradients makes it the plain mean; ours is relative to F.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.fisher()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging",
    https://arxiv.org/abs/2111.09832
    """
    return Chain(FisherMean(floor, square, normalize))


def regmean(
    reduction: float = 0.9,
    grams: Mapping[str, Mapping[str, Tensor]] | None = None,
    unseen: float = 0.0,
) -> Method:
    """RegMean: the update whose outputs are nearest to those of every adapter on the
    inputs that it sees.

        D = (sum_k w_k D_k G_k) (sum_k |w_k| G_k)^+

    with G_k = E[x x^T] of the layer's inputs x at base + adapter k.

    Args:
        reduction: what the off-diagonals of G are multiplied by: the paper's 0.9 (0.1 for T5), 1 in
            MergeLM's code.
        grams: label -> layer -> G, measured elsewhere; without it anchors and a model are needed.
        unseen: in directions that no anchor excites, that much of the mean of the updates:
            0, the pseudo-inverse, or 1.

    Exact, of rank at most the sum of the ranks. The published codes invert sum G; ours is the
    pseudo-inverse, so that layers whose inputs do not span the space are defined too.
    Biases and norms are none of our business.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.regmean()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models",
    https://arxiv.org/abs/2212.09849
    """
    return Chain(RegMean(reduction, unseen, grams))


def tune(
    candidates: Mapping[object, Method] | Sequence[Method] | None = None,
    scales: Sequence[float] = (1.0,),
    loss: Callable[..., Tensor] | None = None,
) -> Method:
    """Choose a density, a scale or a method by the loss on a held-out half of the anchors.

        tune({d: ties(d) for d in (0.1, 0.2, 0.4)}, scales=(0.5, 1.0, 1.5))

    Args:
        candidates: name -> method, or methods, named by their recipes; by default `sap` at five
            densities.
        scales: factors of the merged update that are tried with each.
        loss: (model, batch) -> scalar; the anchors' own by default. A loss without negatives, like
            1 - cos, can be won by collapsing: `contrastive` chooses more safely.

    Needs anchors and a model: at least two batches, or one whose samples can be told apart. The
    curve is in the report; see `Tune`.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.tune()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)
    """
    if candidates is None:
        candidates = {density: sap(density) for density in (0.2, 0.4, 0.6, 0.8, 1.0)}
    if not isinstance(candidates, Mapping):
        candidates = {_name(k, recipe(method)): method for k, method in enumerate(candidates)}
    return Tune(candidates, tuple(scales), loss)


def _name(number: int, text: str) -> str:
    """A recipe, unless a recipe that has it as a name could not be read back:
    text with a colon names a function.
    """
    return f"candidate {number + 1}" if ":" in text else text
