"""The two things that everything else is made of: an `Update`, and a `Layer` that holds one per adapter.

A transform maps a Layer to a Layer, a merger maps a Layer to an Update, a method is a chain of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sapmerge.core.frames import Frames
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError

if TYPE_CHECKING:
    from sapmerge.core.protocols import AnchorPass

__all__ = ["Layer"]


def _no_record(key: str, value: object) -> None:
    """Where notes go when nobody asked for a report."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix as all adapters see it.

    Args:
        name: the module's name, e.g. "vision_model.encoder.layers.0.self_attn.q_proj".
        updates: one per adapter, all of one shape (m, n); rank 0 where an adapter lacks the layer.
        adapters: their labels, for messages and reports.
        weights: one number per adapter, 1.0 by default. Pruning never sees them.
        digests: their content digests, for randomness that does not depend on order or paths. Labels by default.
        anchors: with anchors, where gradients come from (see `sapmerge.anchors`); None without.
        frames: the coordinate systems that the updates are written in, outermost first (see `In`); usually none.
        record: receives notes for the report (`record(key, value)`); does nothing by default.
    """

    name: str
    updates: tuple[Update, ...]
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    digests: tuple[str, ...] = ()
    anchors: AnchorPass | None = field(default=None, repr=False)
    frames: tuple[Frames, ...] = ()
    record: Callable[[str, object], None] = field(default=_no_record, repr=False)

    def __post_init__(self) -> None:
        count = len(self.updates)
        if count == 0:
            raise MethodError(f"layer {self.name!r} has no updates; a Layer needs at least one adapter")
        if not self.adapters:
            object.__setattr__(self, "adapters", tuple(f"adapter{k}" for k in range(count)))
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * count)
        if not self.digests:
            object.__setattr__(self, "digests", self.adapters)
        for what in ("adapters", "weights", "digests"):
            got = len(getattr(self, what))
            if got != count:
                raise MethodError(f"layer {self.name!r} has {count} updates but {got} {what}")
        shapes = {update.shape for update in self.updates}
        if len(shapes) > 1:
            found = ", ".join(f"{a}: {u.shape}" for a, u in zip(self.adapters, self.updates, strict=True))
            raise MethodError(f"layer {self.name!r} needs updates of one shape; got {found}")

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def shape(self) -> tuple[int, int]:
        return self.updates[0].shape

    @property
    def present(self) -> tuple[bool, ...]:
        """Which adapters have the layer."""
        return tuple(update.rank > 0 for update in self.updates)

    def with_updates(self, updates: Sequence[Update]) -> Layer:
        """The same layer with other updates. The anchors are dropped: gradients are those of the updates as read."""
        return replace(self, updates=tuple(updates), anchors=None)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from names and numbers: the only source of randomness in the library."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
