"""What is compared in the bed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from dg import contenders as dg
from dg.contenders import contender, pruned
from dg.trial import AS_IS, MATCHED, Contender
from torch import Tensor

import sapmerge as sm

__all__ = [
    "confirmed",
    "defended",
    "gradients",
    "library",
    "parts",
    "peers",
    "robust",
    "slow",
    "told",
    "upload",
]

LENGTHS = (AS_IS, 0.7, 0.8, 0.9, MATCHED, 1.2)
SHORTER = (AS_IS, 0.8, 0.9, MATCHED)


def decorrelated(left: float, right: float) -> Callable[[sm.Layer], sm.Layer]:
    """`Decorrelate` with a strength for each side;
    a negative one makes directions that adapters share count more.
    """

    def transform(layer: sm.Layer) -> sm.Layer:
        pieces = [update.svd() for update in layer]
        U = _loosened(torch.cat([U for U, _, _ in pieces], 1), left)
        V = _loosened(torch.cat([Vh for _, _, Vh in pieces]).T, right)
        widths = [len(sigma) for _, sigma, _ in pieces]
        parts = zip(U.split(widths, 1), pieces, V.split(widths, 1), strict=True)
        return layer.with_updates(
            [sm.LowRank((P * sigma).float(), Q.T.float()) for P, (_, sigma, _), Q in parts]
        )

    transform.__qualname__ = f"decorrelated_{left}_{right}"
    return transform


def _loosened(X: Tensor, strength: float) -> Tensor:
    """X (X^T X)^(-strength / 2), without what X does not span."""
    values, vectors = torch.linalg.eigh(X.T @ X)
    kept = values > 1e-10 * values[-1]
    powers = torch.where(kept, values.clamp_min(1e-300) ** (-strength / 2), 0.0)
    return X @ (vectors * powers) @ vectors.T


def _at(name: str, method: sm.Method, *lengths: str | float) -> Contender:
    made = contender(name, method)
    return Contender(name, method, made.loss, made.anchors, lengths)


def parts() -> list[Contender]:
    """Every part of `sap` but saliency by itself, on the mean; and lengths of the mean."""
    magnitude = pruned(sm.Magnitude(), 0.9, sm.Factors())
    found = [
        _at("mean", sm.mean(), *LENGTHS),
        _at("anchors' length", sm.ScaleByAnchors(sm.mean()), AS_IS),
        _at("agreement", sm.WeighByAgreement(sm.mean()), MATCHED),
        _at("anchor weights", sm.WeighByAnchors(sm.mean(), margin=0.05), MATCHED),
        _at("pruned by magnitude, 0.9", magnitude, MATCHED),
    ]
    for left, right in ((0.5, 0.5), (1.0, 0.0), (-0.5, -0.5)):
        method = sm.Chain(decorrelated(left, right), sm.Mean())
        found.append(_at(f"decorrelated {left}, {right}", method, MATCHED))
    return found


def peers() -> list[Contender]:
    """The methods that users would take otherwise, at the lengths that are worth trying."""
    return [
        _at("ties", sm.ties(), AS_IS),
        _at("tsv", sm.tsv(), AS_IS, MATCHED),
        _at("iso_c", sm.iso_c(), AS_IS),
    ]


def gradients() -> list[Contender]:
    """What asks the anchors for gradients: as slow as all the others together."""
    return [
        _at("pruned by saliency, 0.9", pruned(sm.Taylor(), 0.9, sm.Factors()), MATCHED),
        _at("sap_original", sm.sap_original(), MATCHED),
        _at("sap, the old default", old_sap(), AS_IS, MATCHED),
    ]


def old_sap() -> sm.Method:
    """The default of `sap` before the choice on this bed."""
    pruning = sm.Prune(sm.Taylor(), sm.TopFraction(0.9), sm.MatchNorm(), sm.Factors())
    inner = sm.ScaleByAnchors(sm.Chain(pruning, sm.Decorrelate(strength=0.5), sm.Mean()))
    return sm.WeighByAgreement(sm.ClipNorms(sm.WeighByAnchors(inner, margin=0.05)))


def confirmed() -> list[Contender]:
    """The default, the mean, and the peers at the lengths that they are best at or made for,
    among equal clients.
    """
    return [_at("mean", sm.mean(), AS_IS, 0.8, MATCHED), _at("sap", sm.sap(), AS_IS), *peers()]


def defended() -> list[Contender]:
    """The same with unequal clients, and robust means."""
    return [
        _at("mean", sm.mean(), AS_IS, MATCHED),
        _at("good ones: mean", sm.mean(), MATCHED),
        _at("sap", sm.sap(), AS_IS),
        _at("sap, flagged", sm.FlagContaminated(sm.sap()), AS_IS),
        _at("geometric_median", sm.geometric_median(), MATCHED),
        _at("coordinate_median", sm.coordinate_median(), MATCHED),
        _at("agreement", sm.WeighByAgreement(sm.mean()), MATCHED),
        _at("ties", sm.ties(), AS_IS),
        _at("krum", sm.krum(), AS_IS),
    ]


def library() -> list[Contender]:
    """Every method that needs nothing but adapters and anchors (`slow` has two more), and `wudi`
    with the filter that keeps it from overshooting (SWUDI).
    """
    found = [*dg.library(), *dg.contrib()]
    for name in ("pico", "score"):
        found.append(contender(name, getattr(sm, name)()))
    found.append(contender("swudi", sm.wudi(share=0.1)))
    found.append(contender("swudi_a", sm.wudi(share="auto")))
    return [Contender(c.name, c.method, c.loss, c.anchors, (AS_IS, MATCHED)) for c in found]


def slow() -> list[Contender]:
    """Those of the library that take as long as all the others together."""
    return [_at("clair", sm.clair(), MATCHED), _at("fedrpca", sm.fedrpca(), MATCHED)]


def told() -> list[Contender]:
    """The mean of the good clients alone, for a server who is told which they are."""
    return [_at("good ones: mean", sm.mean(), *SHORTER)]


def robust() -> list[Contender]:
    """For clients of whom some may be bad."""
    found = [_at("mean", sm.mean(), *SHORTER), *told()]
    found += [_at(name, getattr(sm, name)(), AS_IS) for name in ("ties", "krum")]
    for name in ("geometric_median", "coordinate_median"):
        found.append(_at(name, getattr(sm, name)(), AS_IS, MATCHED))
    found.append(_at("agreement", sm.WeighByAgreement(sm.mean()), MATCHED))
    found.append(_at("anchor weights", sm.WeighByAnchors(sm.mean(), margin=0.05), MATCHED))
    return found


def quantised(layer: sm.Layer) -> sm.Layer:
    """Factors in int8, with a scale for every column of B and row of A."""

    def rounded(factor: Tensor, dim: int) -> Tensor:
        step = factor.abs().amax(dim, keepdim=True).clamp_min(1e-30) / 127
        return (factor / step).round() * step

    return layer.with_updates([sm.LowRank(rounded(u.B, 0), rounded(u.A, 1)) for u in layer])


def truncated(rank: int) -> Callable[[sm.Layer], sm.Layer]:
    """Every update cut to its first singular values, with the norm that this takes given back."""

    def cut(update: sm.Update) -> sm.Update:
        U, sigma, Vh = update.svd(rank)
        kept = sigma[:rank]
        root = (kept * (sigma.norm() / kept.norm().clamp_min(1e-300))).sqrt()
        return sm.LowRank((U * root).to(update.dtype), (root[:, None] * Vh).to(update.dtype))

    def transform(layer: sm.Layer) -> sm.Layer:
        return layer.with_updates([cut(update) for update in layer])

    transform.__qualname__ = f"truncated_{rank}"
    return transform


def upload() -> list[Contender]:
    """What a client may leave out of its upload: the best use of 5,
    10 and 20 % of the bytes of float32 factors.

    Pruned factors cost a byte for a value that is kept and a bit for every value, so that 5, 10 and
    20 % of the bytes are densities of 0.075, 0.275 and 0.675;
    ranks 1, 3 and 6 of 8 in int8 are 3, 9 and 19 %.
    """
    found = [
        _at("mean", sm.mean(), MATCHED),
        _at("int8, 25 %", sm.Chain(quantised, sm.Mean()), MATCHED),
    ]
    scorers = {"saliency": sm.Taylor(), "magnitude": sm.Magnitude(), "random": sm.Random()}
    for share, density, rank in ((5, 0.075, 1), (10, 0.275, 3), (20, 0.675, 6)):
        for name, scorer in scorers.items():
            pruning = sm.Prune(scorer, sm.TopFraction(density), sm.MatchNorm(), sm.Factors())
            found.append(
                _at(f"{name}, {share} %", sm.Chain(pruning, quantised, sm.Mean()), MATCHED)
            )
        found.append(
            _at(f"SVD, {share} %", sm.Chain(truncated(rank), quantised, sm.Mean()), MATCHED)
        )
    return found
