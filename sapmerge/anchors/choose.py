"""Choosing anchors from a larger pool of pairs: a weighted coreset, k-means, and chance beside
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sapmerge.anchors.folders import Pair
from sapmerge.anchors.freezing import frozen
from sapmerge.anchors.loading import Batches, batch_size
from sapmerge.anchors.passes import Passes
from sapmerge.anchors.transport import assign, nearest_plan, sinkhorn, squared_distances
from sapmerge.core.scalars import whole
from sapmerge.core.torch_state import pinned
from sapmerge.errors import AnchorError
from sapmerge.io.machine import at_terminal
from sapmerge.losses import WEIGHT, embeddings
from sapmerge.models import device_of

__all__ = ["Chosen", "at_random", "coreset", "features", "kmeans"]


@dataclass(frozen=True)
class Chosen:
    """Anchors chosen from a pool.

    Args:
        indices: their rows in the pool, distinct and in order.
        weights: how much of the pool each stands for, of sum 1.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]

    def of(self, pool: Sequence[Mapping[str, Any]], batch_size: int = 16) -> list[dict[str, Any]]:
        """The chosen pairs of a pool's batches, as batches of anchors with their weights.

        Args:
            pool: dict batches of tensors, with the samples in the first dimension.
            batch_size: pairs per batch at most, dealt out evenly.

        Raises:
            AnchorError: batches that cannot be joined, as texts padded to different lengths. Take
                the chosen images and texts then: `from_pairs(images, texts, processor,
                weights=chosen.weights)`.
        """
        joined = _joined(pool)
        rows, count = torch.tensor(self.indices), -(-len(self.indices) // batch_size)
        weights = torch.tensor(self.weights) * len(self.weights)
        return [
            {key: value[rows[some].to(value.device)] for key, value in joined.items()}
            | {WEIGHT: weights[some]}
            for some in torch.arange(len(rows)).tensor_split(count)
        ]

    def among(self, pool: Sequence[Pair]) -> list[Pair]:
        """The chosen pairs of a pool, with their weights in the unit of an ordinary pair (mean 1).

        Args:
            pool: the pairs in the order of the features or batches that these were chosen from, as
                `read_folder` gives them; weights of their own are replaced.

        Raises:
            AnchorError: a row that the pool does not have.

        Example:
            >>> from sapmerge import anchors
            >>> pool = [anchors.Pair("a.jpg", "an ape"), anchors.Pair("b.jpg", "a bird")]
            >>> anchors.Chosen((1,), (1.0,)).among(pool)
            [Pair(image='b.jpg', text='a bird', weight=1.0)]
        """
        if max(self.indices, default=0) >= len(pool):
            raise AnchorError(f"row {max(self.indices)} was chosen; the pool has {len(pool)} pairs")
        return [
            replace(pool[index], weight=weight * len(self.indices))
            for index, weight in zip(self.indices, self.weights, strict=True)
        ]


@pinned
def features(pool: Any, model: Any, progress: bool | None = None) -> Tensor:
    """What a model makes of a pool: unit image and text embeddings side by side, / sqrt 2.

    Args:
        pool: re-iterable dict batches, as `anchor_loader`.
        model: with `get_image_features` and `get_text_features`.
        progress: False: no bar. None: one if stderr is a terminal.

    Returns:
        (pairs, d), float64 on the CPU; distances lie between 0 and 2.

    Raises:
        AnchorError: no batches, or no embeddings of them.
    """
    found = list[Tensor]()
    with frozen(model) as base, torch.no_grad():
        batches = Batches(pool, device_of(base))
        passes = Passes(at_terminal() if progress is None else progress)
        for batch in passes.over(batches, len(batches), "embeddings"):
            found.append(torch.cat(embeddings(base, batch), dim=1).double().cpu() / 2**0.5)
    return torch.cat(found)


def coreset(
    pool: Any,
    count: int,
    model: Any = None,
    seed: int = 0,
    balanced: bool = False,
    rounds: int = 30,
) -> Chosen:
    """A few weighted pairs that stand for a pool: an entropic coreset.

        min over atoms z and masses a of OT_eps(sum_j a_j delta_{z_j}, pool)

    With the masses free each round has a closed form: P_ij = softmax_j(-|x_i - z_j|^2 / eps) / N,
    and z_j is the barycentre of what it gets. eps falls from the mean cost of the start, k-means++,
    to a tenth of it. Atoms then become distinct pairs, at the least total distance, and a last plan
    gives these their weights. An atom that gets nothing stays where it is; of duplicates in the
    pool each pair is taken once at most, and they share their weight.

    Args:
        pool: re-iterable dict batches, as `anchor_loader`; or features (N, d), without a model.
        count: how many pairs.
        model: as in `merge`, for the features (see `features`).
        seed: of the start.
        balanced: all weights equal, at the cost of iterations (Sinkhorn) in every round.
        rounds: how many.

    Returns:
        The rows in the pool, and their weights.

    Raises:
        AnchorError: more pairs than the pool has, features that are NaN, no model for batches.

    Example:
        >>> import torch
        >>> pool = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
        >>> coreset(pool, 2)
        Chosen(indices=(1, 3), weights=(0.75, 0.25))

    Source: the coreset that CCVFM describes, as far as its text tells; the definition is ours.
    """
    x = _points(pool, count, model)
    atoms = _spread(x, count, seed)
    start = float(squared_distances(x, atoms).amin(1).mean())
    equal = torch.full((count,), 1 / count, dtype=torch.float64)
    mass = torch.full((len(x),), 1 / len(x), dtype=torch.float64)

    def plan(atoms: Tensor, epsilon: float) -> Tensor:
        costs = squared_distances(x, atoms)
        if balanced and epsilon > 0:
            return sinkhorn(mass, equal, costs, epsilon, steps=500)
        return nearest_plan(costs, epsilon)

    epsilon = start
    for number in range(rounds):
        epsilon = start * 0.1 ** (number / max(1, rounds - 1))
        found = plan(atoms, epsilon)
        got = found.sum(0)[:, None]
        atoms = torch.where(got > 1e-12, found.T @ x / got.clamp_min(1e-12), atoms)
    rows = torch.tensor(assign(squared_distances(atoms, x))).sort().values
    weights = equal if balanced else nearest_plan(squared_distances(x, x[rows]), epsilon).sum(0)
    return _chosen(rows, weights)


def kmeans(pool: Any, count: int, model: Any = None, seed: int = 0, rounds: int = 50) -> Chosen:
    """The pairs nearest to the centres of k-means, started by k-means++; weights are the clusters'
    shares.

    Args:
        pool: as in `coreset`.
        count: how many pairs.
        model: as in `coreset`.
        seed: of the start.
        rounds: at most.

    Raises:
        AnchorError: as `coreset`.

    Example:
        >>> import torch
        >>> kmeans(torch.tensor([[0.0], [0.1], [0.2], [5.0]]), 2)
        Chosen(indices=(1, 3), weights=(0.75, 0.25))

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    """
    x = _points(pool, count, model)
    centres = _spread(x, count, seed)
    nearest = torch.full((len(x),), -1)
    for _ in range(rounds):
        before, nearest = nearest, squared_distances(x, centres).argmin(1)
        if torch.equal(before, nearest):
            break
        for k in range(count):
            if bool((nearest == k).any()):
                centres[k] = x[nearest == k].mean(0)
    rows = torch.tensor(assign(squared_distances(centres, x)))
    shares = torch.bincount(nearest, minlength=count).double() / len(x)
    order = rows.argsort()
    return _chosen(rows[order], shares[order])


def at_random(pool: Any, count: int, seed: int = 0) -> Chosen:
    """Pairs by chance, of equal weights.

    Args:
        pool: as in `coreset`; no model is needed.
        count: how many pairs.
        seed: of the choice.

    Raises:
        AnchorError: more pairs than the pool has.

    Example:
        >>> import torch
        >>> at_random(torch.eye(9), 2).weights
        (0.5, 0.5)
    """
    size = len(pool) if isinstance(pool, Tensor) else sum(batch_size(batch) for batch in pool)
    _check_count(count, size)
    rows = np.random.default_rng(seed).choice(size, count, replace=False)
    return _chosen(torch.tensor(sorted(rows.tolist())), torch.full((count,), 1 / count))


def _chosen(rows: Tensor, weights: Tensor) -> Chosen:
    return Chosen(tuple(map(int, rows)), tuple(map(float, weights)))


def _points(pool: Any, count: int, model: Any) -> Tensor:
    if isinstance(pool, Tensor):
        x = pool.detach().double().cpu()
    elif model is None:
        raise AnchorError("a pool of batches needs a model; or pass features (N, d)")
    else:
        x = features(pool, model)
    if x.ndim != 2 or not bool(torch.isfinite(x).all()):
        raise AnchorError(f"features are (N, d) finite numbers; got {tuple(x.shape)}")
    _check_count(count, len(x))
    return x


def _check_count(count: int, size: int) -> None:
    if whole(count, 1, size) is None:
        raise AnchorError(
            f"count is a whole number of pairs of the pool, 1 to {size}; got {count!r}"
        )


def _spread(x: Tensor, count: int, seed: int) -> Tensor:
    """The start of k-means++: each next point by its squared distance to those that there are."""
    generator = np.random.default_rng(seed)
    rows = [int(generator.integers(len(x)))]
    nearest = squared_distances(x, x[rows]).amin(1)
    while len(rows) < count:
        total = float(nearest.sum())
        chances = nearest.numpy() / total if total > 0 else np.full(len(x), 1 / len(x))
        rows.append(int(generator.choice(len(x), p=chances / chances.sum())))
        nearest = torch.minimum(nearest, squared_distances(x, x[rows[-1:]])[:, 0])
    return x[rows]


def _joined(pool: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """All batches as one, without what is no tensor of one row per pair."""
    batches = list(pool)
    if not batches:
        raise AnchorError("there is no pool: it has no batch")
    joined = dict[str, Tensor]()
    for key in batches[0]:
        parts = [cast("Any", batch.get(key)) for batch in batches]
        if key == WEIGHT or not all(isinstance(part, Tensor) and part.ndim for part in parts):
            if key != WEIGHT:
                raise AnchorError(f"{key!r} must be a tensor, a row per pair, in every batch")
            continue
        if len({part.shape[1:] for part in parts}) > 1:
            raise AnchorError(
                f"{key!r} has rows of different shapes in the batches of the pool, as texts that "
                "are padded to different lengths have; make batches of the chosen ones: "
                "from_pairs(images, texts, processor, weights=chosen.weights)"
            )
        joined[key] = torch.cat(parts)
    sizes = {len(value) for value in joined.values()}
    if len(sizes) != 1:
        raise AnchorError(f"the pool's tensors have {sorted(sizes)} rows; expected one per pair")
    return joined
