"""Who is near whom: the weights of Pilot's text adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.lowrank import whole_gram
from sapmerge.core.scalars import whole
from sapmerge.errors import MethodError, SapmergeWarning
from sapmerge.merging.inputs import Adapters, check_mergeable, load_adapters, resolve_weights
from sapmerge.merging.stream import AdapterLayers

__all__ = ["neighbours"]

_ROUNDING = 1e-13
"""A squared distance this small beside the squared norms is the rounding of their difference."""


def neighbours(
    adapters: Adapters,
    count: int = 3,
    samples: Sequence[float] | Mapping[str, float] | None = None,
    self_weight: float | None = None,
    distance: Literal["euclidean", "cosine"] = "euclidean",
) -> Tensor:
    """Weights of every client for itself and for the clients nearest to it; rows sum to 1.

        W[k, k] = s_k,    W[k, i] = (1 - s_k) (1 / d_ki) / sum_{j near k} 1 / d_kj

    for the `count` nearest i, with d the distance between whole updates, and
    s_k = n_k / (n_k + sum_{i near k} n_i) unless `self_weight` is given. A distance of 0 takes all
    of 1 - s_k, copies in equal parts. Ties go to the lower content digest.

    Args:
        adapters: as for `merge`, K of them.
        count: of neighbours; K - 1 or more take all.
        samples: per client, 1 by default.
        self_weight: s_k for everybody, in [0, 1]; how the paper mixes is not unambiguous.
        distance: "euclidean" as in the paper. Updates of different clients are nearly orthogonal,
            so the nearest are the shortest; "cosine" (sqrt(2 - 2 cos)) asks for direction alone.

    Returns:
        (K, K), float64, in the order of the adapters; one pass over the layers.

    Raises:
        MethodError: a zero adapter with "cosine", or an argument out of range.

    Warns:
        SapmergeWarning: with "euclidean", norms differ by more than 1.5, or an adapter is zero.
    """
    number = whole(count, 1)
    if distance not in ("euclidean", "cosine") or number is None:
        raise MethodError(
            "distance is 'euclidean' or 'cosine', count a whole number from 1 on; got "
            f"{distance!r} and {count!r}"
        )
    if self_weight is not None and not 0 <= self_weight <= 1:
        raise MethodError(f"self_weight is a share in [0, 1]; got {self_weight!r}")
    opened = load_adapters(adapters)
    check_mergeable(opened)
    numbers = resolve_weights(samples, opened)
    if min(numbers) <= 0:
        raise MethodError(f"samples are positive numbers; got {numbers}")
    stream = AdapterLayers.of(opened, [1.0] * len(opened), torch.device("cpu"))
    gram = whole_gram(stream)[0]
    place = {adapter.label: k for k, adapter in enumerate(stream.adapters)}
    order = [place[adapter.label] for adapter in opened]
    squares = _squares(gram[order][:, order], distance, [adapter.label for adapter in opened])
    W = torch.zeros(len(opened), len(opened), dtype=torch.float64)
    for k in range(len(opened)):
        others = sorted(
            (i for i in range(len(opened)) if i != k),
            key=lambda i: (float(squares[k, i]), opened[i].digest),
        )
        near = others[:number]
        share = (
            numbers[k] / (numbers[k] + sum(numbers[i] for i in near))
            if self_weight is None
            else self_weight
        )
        W[k, k] = share if near else 1.0
        copies = [i for i in near if squares[k, i] == 0]
        parts = dict.fromkeys(copies, 1.0) or {i: float(squares[k, i]) ** -0.5 for i in near}
        for i, part in parts.items():
            W[k, i] = (1 - share) * part / sum(parts.values())
    return W


def _squares(gram: Tensor, distance: str, labels: Sequence[str]) -> Tensor:
    """Squared distances of all pairs."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    zero = [label for label, norm in zip(labels, norms) if norm == 0]
    if distance == "cosine":
        if zero:
            raise MethodError(
                f"the update of {zero[0]!r} is zero and has no direction; use distance='euclidean'"
            )
        gram = gram / torch.outer(norms, norms)
    elif zero and len(labels) > 1:
        warnings.warn(f"{zero}: a zero adapter is near to everybody", SapmergeWarning, stacklevel=3)
    elif float(norms.max()) > 1.5 * float(norms.min()):
        warnings.warn(
            "norms differ by more than 1.5, and the nearest by euclidean distance are the "
            "shortest; distance='cosine' asks for direction",
            SapmergeWarning,
            stacklevel=3,
        )
    own = gram.diagonal()
    sums = own[:, None] + own[None, :]
    squares = sums - 2 * gram
    return torch.where(squares > _ROUNDING * sums, squares, 0.0)
