"""PCB: parameters compete, within an adapter by size and between adapters by agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.selection import kth_largest
from sapmerge.core.updates import Dense, Update
from sapmerge.errors import MethodError
from sapmerge.parts.masks import check_density, count_kept
from sapmerge.parts.wrappers import Chain

__all__ = ["Compete", "ExpSquare", "TanhMixed", "TanhNormalised", "TanhRaw", "pcb"]

Intra: TypeAlias = Callable[[Tensor], Tensor]
"""(normalised magnitudes of the adapters (K, m, n), in [0, 1]) -> positive scores."""
Inter: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(updates (K, m, n), signed normalised magnitudes (K, m, n)) -> scores;
negative where an adapter disagrees.
"""


@part
class ExpSquare:
    """exp(K n^2): what is large in its own adapter,
    the more sharply the more adapters there are.
    """

    def __call__(self, normalised: Tensor) -> Tensor:
        return torch.exp(len(normalised) * normalised.square())


@part
class TanhNormalised:
    """sum_j tanh(n_i n_j): agreement in normalised values (`pcb_ES.py`).
    The scale of updates is immaterial.
    """

    def __call__(self, values: Tensor, normalised: Tensor) -> Tensor:
        return torch.stack([torch.tanh(one * normalised).sum(0) for one in normalised])


@part
class TanhRaw:
    """tanh(D_i sum_j D_j): agreement in raw values (`pcb-merging.py`).
    For small updates tanh(x) is x, and near 0.
    """

    def __call__(self, values: Tensor, normalised: Tensor) -> Tensor:
        return torch.tanh(values * values.sum(0))


@part
class TanhMixed:
    """tanh(D_i sum_j n_j): raw times normalised (`pcb.py`)."""

    def __call__(self, values: Tensor, normalised: Tensor) -> Tensor:
        return torch.tanh(values * normalised.sum(0))


@dataclass(frozen=True)
class _Adapter:
    """What the pre-pass learns of one adapter: magnitudes are clipped to [low, high],
    scores scaled from [cut, top].
    """

    low: float
    high: float
    cut: float = 0.0
    top: float = 0.0


@part
class Compete:
    """Score every entry by intra * inter, keep the top share of each adapter,
    and average with the scores as weights.

        t = sign(D) clip(|D|)    n = sign(D) (clip|D| - min) / (max - min)
        score = intra(|n|) * inter(D, n)
        s = (score - cut) / (top - cut) where positive, else 0
        result = sum_k w_k s_k t_k / sum_k |w_k| s_k

    Clipping, minimum, maximum and cut are over the whole adapter, found in a pre-pass. K counts the
    adapters that have a weight and are not zero. With density 1 nothing is cut,
    and the lowest score keeps a share of 1e-12.

    Args:
        density: the fraction of each adapter's entries kept: floor(density n + 1e-9).
        clip: the share of magnitudes clipped at either end.
        intra: competition within an adapter, `ExpSquare()`.
        inter: competition between adapters: `TanhNormalised()`, `TanhRaw()`, `TanhMixed()`.
    """

    density: float = 0.05
    clip: float = 0.01
    intra: Intra = ExpSquare()
    inter: Inter = TanhNormalised()
    fitted: Mapping[str, _Adapter] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_density(self.density)
        if not 0 <= self.clip < 0.5:
            raise MethodError(
                f"Compete's clip is the share clipped at either end, in [0, 0.5); got {self.clip!r}"
            )

    def prepare(self, layers: LayerStream) -> Compete:
        voters = _voters(layers)

        def sizes() -> Iterator[tuple[str, Tensor]]:
            for layer in layers:
                for member in layer.members:
                    if member.label in voters and member.counts:
                        yield member.label, member.update.dense().abs()

        lows = kth_largest(sizes, lambda n: n - int(n * self.clip))
        highs = kth_largest(sizes, lambda n: n - int(n * (1 - self.clip) - 1))
        fitted = {a: _Adapter(min(lows[a], highs[a]), highs[a]) for a in voters}

        def scores() -> Iterator[tuple[str, Tensor]]:
            for layer in layers:
                for k, _, score in self._scored(layer, fitted):
                    yield layer.adapters[k], score

        cuts = kth_largest(scores, lambda n: min(n, count_kept(self.density, n) + 1))
        tops = kth_largest(scores, lambda n: 1)
        return replace(
            self, fitted={a: replace(fitted[a], cut=cuts[a], top=tops[a]) for a in voters}
        )

    def __call__(self, layer: Layer) -> Update:
        if self.fitted is None:
            raise unprepared(self)
        total = torch.zeros(layer.shape, dtype=torch.float64, device=layer.updates[0].device)
        mass = torch.zeros_like(total)
        for k, clipped, score in self._scored(layer, self.fitted):
            adapter, weight = self.fitted[layer.adapters[k]], layer.weights[k]
            span = adapter.top - adapter.cut
            share = (score - adapter.cut) / span if span > 0 else (score >= adapter.top).double()
            share = share.clamp(min=1e-12 if self.density == 1 else 0.0)
            total += weight * share * clipped
            mass += abs(weight) * share
        merged = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.0)
        return Dense(merged.to(layer.updates[0].dtype))

    def _scored(
        self, layer: Layer, fitted: Mapping[str, _Adapter]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(adapter, clipped update, scores), in float64,
        of the adapters that compete in the layer.
        """
        members = [
            k for k, update in enumerate(layer) if not update.absent and layer.adapters[k] in fitted
        ]
        if not members:
            return
        values = torch.stack(
            [layer.updates[k].dense().double() * _sign(layer.weights[k]) for k in members]
        )
        ranges = [fitted[layer.adapters[k]] for k in members]
        low = torch.tensor([r.low for r in ranges], dtype=torch.float64, device=values.device)[
            :, None, None
        ]
        high = torch.tensor([r.high for r in ranges], dtype=torch.float64, device=values.device)[
            :, None, None
        ]
        sizes = torch.minimum(torch.maximum(values.abs(), low), high)
        span = high - low
        normalised = torch.where(span > 0, (sizes - low) / torch.where(span > 0, span, 1.0), 1.0)
        score = self.intra(normalised) * self.inter(values, values.sign() * normalised)
        for position, k in enumerate(members):
            yield (
                k,
                values[position].sign() * sizes[position] * _sign(layer.weights[k]),
                score[position],
            )


_INTRA, _INTER = ExpSquare(), TanhNormalised()


def pcb(
    density: float = 0.05, clip: float = 0.01, intra: Intra = _INTRA, inter: Inter = _INTER
) -> Method:
    """PCB-Merging: parameters compete within their adapter by size and between adapters by
    agreement; winners average.

    See `Compete` for the formula. The defaults are those of `pcb_ES.py`, which made the numbers
    with evolved weights; `pcb-merging.py` is pcb(0.1, clip=1e-4, inter=TanhRaw()), which depends on
    the scale of the updates. The paper writes softmax for intra and inter;
    the authors' three scripts use exp and tanh, as here.

    Args:
        density: the fraction of entries kept per adapter ("ratio": 0.05, or 0.1).
        clip: the share of magnitudes clipped at either end of each adapter.
        intra: competition within an adapter.
        inter: competition between adapters.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.pcb())

    Source: Du et al., "Parameter competition balancing for model merging",
    https://arxiv.org/abs/2410.02396. Their lambda (1.2) is `scale=` of `merge`;
    their code keeps n - int((1 - ratio) n) - 1 entries.
    """
    return Chain(Compete(density, clip, intra, inter))


def _voters(layers: LayerStream) -> list[str]:
    """The adapters that have a weight and an update that is not zero."""
    votes: dict[str, bool] = {}
    for layer in layers:
        for member in layer.members:
            if member.counts:
                votes[member.label] = votes.get(member.label, False) or bool(
                    member.update.dense().any()
                )
    return [label for label, counts in votes.items() if counts]


def _sign(weight: float) -> float:
    return 1.0 if weight > 0 else -1.0
