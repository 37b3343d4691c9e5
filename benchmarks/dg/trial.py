"""One merge, tested on the domain that was left out:
as the method makes it, and with its energy matched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import sapmerge as sm
from dg.data import Domain, Task
from dg.encoders import Encoder, accuracy
from sapmerge.core.part import recipe

__all__ = ["AS_IS", "MATCHED", "Contender", "Place", "Server"]

AS_IS, MATCHED = "as is", "energy matched"


@dataclass(frozen=True, eq=False)
class Contender:
    """One row of a table.

    Args:
        method: of the merge.
        loss: on the anchors.
        anchors: how many public pairs; 0 for a method that asks none.
        lengths: `AS_IS`, `MATCHED` (the merged update scaled to the mean norm of its inputs),
            or multiples of that.
    """

    name: str
    method: sm.Method
    loss: Callable[..., Tensor] = sm.alignment
    anchors: int = 0
    lengths: tuple[str | float, ...] = (AS_IS, MATCHED)

    @property
    def recipe(self) -> str:
        """All that decides what it makes."""
        return (
            f"{recipe(self.method)}; {self.loss.__name__}, {self.anchors} anchors"
            if self.anchors
            else recipe(self.method)
        )


class Place:
    """A copy of a model whose weights are base + factor x update while it is tested."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self._base = model

    @torch.no_grad()
    def put(self, updates: Mapping[str, sm.Update], factor: float = 1.0) -> nn.Module:
        """The copy with these updates and no others."""
        self.model.load_state_dict(self._base.state_dict())
        for name, update in updates.items():
            weight = self.model.get_submodule(name).weight
            weight += (update.dense() * factor).to(weight)
        return self.model


@dataclass(eq=False)
class Server:
    """What the server has, and the images that it never sees.

    Args:
        adapters: label -> checkpoint.
        test: of the domain left out.
        cache: a folder for the anchors' statistics, shared by methods that ask for the same ones.
    """

    encoder: Encoder
    task: Task
    adapters: Mapping[str, Path]
    test: Domain
    seed: int
    place: Place
    cache: Path | None = None
    _size: float = field(default=0.0, init=False)
    _seen: list[tuple[Tensor, float]] = field(default_factory=list, init=False)

    def rows(self, contender: Contender) -> Iterator[tuple[str, float]]:
        """(length, accuracy) of one method, merged once."""
        updates = self.merged(contender)
        norm = sum(update.norm() ** 2 for update in updates.values()) ** 0.5
        for length in contender.lengths:
            multiple = 1.0 if isinstance(length, str) else length
            factor = 1.0 if length == AS_IS or norm == 0 else multiple * self.size / norm
            yield str(length), self._tested(updates, factor)

    def merged(self, contender: Contender) -> dict[str, sm.Update]:
        """The merged updates, not cut to any rank."""
        loader = self._loader(contender.anchors) if contender.anchors else None
        merged = sm.merge(
            self.adapters,
            loader,
            self.encoder.model if loader else None,
            method=contender.method,
            loss=contender.loss if loader else None,
            cache=self.cache if loader else None,
            device=self.encoder.device,
            progress=False,
        )
        return dict(merged.updates())

    def _tested(self, updates: Mapping[str, sm.Update], factor: float) -> float:
        """The accuracy with factor x updates. What equals an earlier update (the median of two is
        their mean) is not tested again: equal are updates with equal projections on
        random directions."""
        generator = torch.Generator().manual_seed(0)
        mark = factor * torch.stack([_projection(update, generator) for update in updates.values()])
        for known, tested in self._seen:
            if torch.allclose(known, mark, rtol=1e-4, atol=1e-5 * float(known.abs().max())):
                return tested
        self._seen.append((mark, self.accuracy(self.place.put(updates, factor))))
        return self._seen[-1][1]

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(self.encoder, model, self.test.images, self.test.labels, self.task.text)

    @property
    def size(self) -> float:
        """The mean norm of the adapters."""
        if not self._size:
            opened = [sm.Adapter.load(path) for path in self.adapters.values()]
            norms = [sum(a.update(name).norm() ** 2 for name in a.modules) ** 0.5 for a in opened]
            self._size = sum(norms) / len(norms)
        return self._size

    def _loader(self, count: int, batch: int = 16) -> list[dict[str, Tensor]]:
        images, text = self.task.anchors(self.seed, count)
        return [
            {"pixel_values": self.encoder.pixels(some), "text_embeds": words}
            for some, words in zip(images.split(batch), text.split(batch), strict=True)
        ]


def _projection(update: sm.Update, generator: torch.Generator) -> Tensor:
    """x^T D y for random x and y."""
    left, right = (
        torch.randn(count, generator=generator).to(update.device) for count in update.shape
    )
    if isinstance(update, sm.LowRank):
        return (left.to(update.dtype) @ update.B) @ (update.A @ right.to(update.dtype))
    return left.to(update.dtype) @ update.dense() @ right.to(update.dtype)
