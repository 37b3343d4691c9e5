"""One merge, tested on the domain that was left out:
which of its images are named rightly, at several lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from dg.data import Domain, Task
from dg.trial import AS_IS, Contender
from torch import Tensor, nn

import sapmerge as sm
from bed.half import Half

__all__ = ["Server", "pack", "unpack"]


@dataclass(eq=False)
class Server:
    """What the server has, and the images that it never sees.

    Args:
        task: with tokens in the place of images.
        adapters: label -> checkpoint.
        bad: labels of the clients that a perfect server would leave out.
        test: of the domain left out.
        seed: of the anchors.
        cache: a folder for the anchors' gradients, shared by methods that ask for the same ones.
    """

    half: Half
    task: Task
    adapters: Mapping[str, Path]
    bad: frozenset[str]
    test: Domain
    seed: int
    cache: Path | None = None

    losses: ClassVar[tuple[Callable[..., Tensor], ...]] = (
        sm.alignment,
        sm.centered_alignment,
        sm.contrastive,
    )
    """Those of which `anchor_losses` tells; the first is that of the merges."""

    def rows(self, contender: Contender) -> Iterator[tuple[str, Tensor]]:
        """(length, which test images are right) of one method, merged once.

        A contender whose name begins with "good ones: " merges without the bad clients.
        """
        told = contender.name.startswith("good ones: ")
        adapters = {k: v for k, v in self.opened.items() if not (told and k in self.bad)}
        updates = self._merged(contender, adapters)
        norm = sum(update.norm() ** 2 for update in updates.values()) ** 0.5
        size = sum(self.norms[label] for label in adapters) / len(adapters)
        for length in contender.lengths:
            multiple = 1.0 if isinstance(length, str) else length
            factor = 1.0 if length == AS_IS or norm == 0 else multiple * size / norm
            yield str(length), self.right(updates, factor)

    def _merged(
        self, contender: Contender, adapters: Mapping[str, sm.Adapter]
    ) -> dict[str, sm.Update]:
        loader = self._loader(contender.anchors) if contender.anchors else None
        merged = sm.merge(
            adapters,
            loader,
            self.half if loader else None,
            method=contender.method,
            loss=self.losses[0] if loader else None,
            cache=self.cache if loader else None,
            progress=False,
        )
        return dict(merged.updates())

    @torch.no_grad()
    def right(self, updates: Mapping[str, sm.Update], factor: float = 1.0) -> Tensor:
        """Which test images are named rightly at base + factor x updates: (N,) bool."""
        model = copy.deepcopy(self.half)
        for name, update in updates.items():
            model.get_submodule(name).weight.add_(update.dense(), alpha=factor)
        model = model.bfloat16()
        features = torch.cat([model(part) for part in self.test.images.split(256)]).float()
        return (features @ self.task.text.T).argmax(1) == self.test.labels

    @cached_property
    def opened(self) -> dict[str, sm.Adapter]:
        return {label: sm.Adapter.load(path) for label, path in self.adapters.items()}

    @cached_property
    def norms(self) -> dict[str, float]:
        """Label -> the norm of its adapter."""
        return {
            label: float(size)
            for label, size in zip(self.adapters, self.products.diagonal().sqrt())
        }

    @cached_property
    def products(self) -> Tensor:
        """(K, K): the inner products of the adapters' updates."""
        opened = list(self.opened.values())
        total = torch.zeros(len(opened), len(opened), dtype=torch.float64)
        for name in opened[0].modules:
            B, A = zip(
                *(
                    (u.B.double(), u.A.double())
                    for u in (adapter.update(name) for adapter in opened)
                )
            )
            left, right = torch.cat(B, 1), torch.cat(A)
            rank = left.shape[1] // len(opened)
            products = (left.T @ left) * (right @ right.T)
            total += products.unflatten(0, (-1, rank)).unflatten(2, (-1, rank)).sum((1, 3))
        return total

    def _loader(self, count: int, batch: int = 16) -> list[dict[str, Tensor]]:
        tokens, text = self.task.anchors(self.seed, count)
        return [
            {"pixel_values": some.float(), "text_embeds": words}
            for some, words in zip(tokens.split(batch), text.split(batch), strict=True)
        ]

    def _embedded(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the image embeddings, for several losses."""
        return {"image_embeds": model(batch["pixel_values"]), "text_embeds": batch["text_embeds"]}

    @torch.no_grad()
    def anchor_losses(self, count: int = 32) -> dict[str, dict[str, float]]:
        """Loss -> label -> its mean over the anchors at base + adapter; "" is the base."""
        found: dict[str, dict[str, float]] = {}
        loader = self._loader(count)
        for label, adapter in (("", None), *self.opened.items()):
            model = copy.deepcopy(self.half)
            for name in adapter.modules if adapter else ():
                model.get_submodule(name).weight.add_(adapter.update(name).dense())
            seen = [self._embedded(model, batch) for batch in loader]
            for loss in self.losses:
                values = [float(loss(model, batch)) for batch in seen]
                found.setdefault(loss.__name__, {})[label] = sum(values) / len(values)
        return found


def pack(right: Tensor) -> str:
    """Booleans as hexadecimal digits, the first one the lowest bit."""
    return f"{sum(1 << k for k in right.nonzero().flatten().tolist()):x}"


def unpack(text: str, count: int) -> list[bool]:
    number = int(text, 16)
    return [bool(number >> k & 1) for k in range(count)]
