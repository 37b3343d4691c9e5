"""A `Layer`: one weight matrix of the base, and its update from every adapter.

A transform maps a Layer to a Layer, a merger maps a Layer to one update,
a method is a chain of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from sapmerge.core.frames import Frames
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import MethodError

__all__ = ["Layer", "Member"]


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter's part in a layer.

    Args:
        update: of the weight matrix, (m, n); absent (of rank 0) if the adapter lacks the layer.
        label: the adapter's, for messages and reports.
        weight: of the adapter in the merge. Pruning never sees it.
        digest: of the adapter's content, for randomness that does not depend on order or paths;
            the label by default.
    """

    update: Update
    label: str
    weight: float = 1.0
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", self.label)

    @property
    def absent(self) -> bool:
        """Whether the adapter lacks the layer."""
        return self.update.absent

    @property
    def counts(self) -> bool:
        """Whether the adapter has the layer, and a weight that is not zero."""
        return not self.update.absent and self.weight != 0


def _no_record(key: str, value: object) -> None:
    """Where notes go when nobody asked for a report."""


@dataclass(frozen=True, eq=False, init=False)
class Layer:
    """One weight matrix, and its update from every adapter.
    Pure data: a part may change nothing in it.

    Args:
        name: the module's name, e.g. "vision_model.encoder.layers.0.self_attn.q_proj".
        updates: one per adapter, all of one shape (m, n), absent (of rank 0) where an adapter lacks
            the layer; or whole `Member`s, which say the rest too.
        adapters: their labels; "adapter0", ... by default.
        weights: one number per adapter, 1.0 by default.
        digests: their content digests; the labels by default.
        frames: the coordinate systems that the updates are written in, outermost first (see `In`);
            usually none.
        record: receives notes for the report (`record(key, value)`); does nothing by default.
        members: where what is not given comes from, so that `dataclasses.replace(layer,
            weights=...)` works.

    Raises:
        MethodError: no updates, updates of different shapes, or labels,
            weights or digests of another number.
    """

    name: str
    members: tuple[Member, ...]
    frames: tuple[Frames, ...] = ()
    record: Callable[[str, object], None] = field(default=_no_record, repr=False)

    def __init__(
        self,
        name: str,
        updates: Iterable[Update | Member] = (),
        adapters: Sequence[str] = (),
        weights: Sequence[float] = (),
        digests: Sequence[str] = (),
        frames: tuple[Frames, ...] = (),
        record: Callable[[str, object], None] = _no_record,
        members: Iterable[Member] = (),
    ) -> None:
        # what is not given is theirs: dataclasses.replace(layer, updates=...)
        if known := tuple(members):
            updates = tuple(updates) or [member.update for member in known]
            adapters = adapters or [member.label for member in known]
            weights = weights or [member.weight for member in known]
            digests = digests or [member.digest for member in known]
        given = tuple(updates)
        for what, values in (("adapters", adapters), ("weights", weights), ("digests", digests)):
            if values and len(values) != len(given):
                raise MethodError(
                    f"layer {name!r} has {len(given)} updates but {len(values)} {what}"
                )
        made = tuple(
            update
            if isinstance(update, Member)
            else Member(
                update,
                adapters[k] if adapters else f"adapter{k}",
                weights[k] if weights else 1.0,
                digests[k] if digests else "",
            )
            for k, update in enumerate(given)
        )
        if not made:
            raise MethodError(f"layer {name!r} has no updates; a Layer needs at least one adapter")
        for member in made:
            if not isinstance(member.update, (LowRank, Dense)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise MethodError(
                    f"the updates of layer {name!r} are LowRank(B, A) or Dense(matrix); that of "
                    f"{member.label!r} is a {type(member.update).__name__}"
                )
        if len({member.update.shape for member in made}) > 1:
            shapes = ", ".join(f"{member.label}: {member.update.shape}" for member in made)
            raise MethodError(f"layer {name!r} needs updates of one shape; got {shapes}")
        for key, value in (
            ("name", name),
            ("members", made),
            ("frames", frames),
            ("record", record),
        ):
            object.__setattr__(self, key, value)

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def updates(self) -> tuple[Update, ...]:
        """One per adapter."""
        return tuple(member.update for member in self.members)

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """The labels of the adapters."""
        return tuple(member.label for member in self.members)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """One number per adapter."""
        return tuple(member.weight for member in self.members)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The content digests of the adapters."""
        return tuple(member.digest for member in self.members)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the layer."""
        return self.members[0].update.shape

    @property
    def present(self) -> tuple[bool, ...]:
        """Which adapters have the layer."""
        return tuple(not member.absent for member in self.members)

    def with_members(self, members: Iterable[Member]) -> Layer:
        """The same layer with other members."""
        return Layer(self.name, members, frames=self.frames, record=self.record)

    def with_updates(self, updates: Sequence[Update]) -> Layer:
        """The same layer with other updates, one per adapter."""
        given = tuple(updates)
        if len(given) != len(self.members):
            raise MethodError(
                f"layer {self.name!r} has {len(self.members)} adapters; got {len(given)} updates"
            )
        return self.with_members(
            replace(m, update=u) for m, u in zip(self.members, given, strict=True)
        )

    def with_weights(self, weights: Sequence[float]) -> Layer:
        """The same layer with other weights, one per adapter."""
        return self.with_members(
            replace(m, weight=w) for m, w in zip(self.members, weights, strict=True)
        )

    def inside(self, frames: Frames, updates: Sequence[Update] | None = None) -> Layer:
        """The same layer in the coordinates of frames.

        Args:
            frames: the innermost coordinate system.
            updates: the coordinates; by default those of the updates.
        """
        updates = [frames.inside(update) for update in self] if updates is None else updates
        inner = self.with_updates(updates)
        return Layer(self.name, inner.members, frames=(*self.frames, frames), record=self.record)

    def noting(self, record: Callable[[str, object], None]) -> Layer:
        """The same layer, with notes for a report."""
        return Layer(self.name, self.members, frames=self.frames, record=record)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from names and numbers: the only source of randomness in the library."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def outermost(layer: Layer, update: Update) -> Update:
    """The update of the weight itself, from its coordinates in the frames of a layer."""
    for frames in reversed(layer.frames):
        update = frames.outside(update)
    return update
