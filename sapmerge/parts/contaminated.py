"""Adapters that do not belong to the others: flagged by several tests, and left out of a method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import field, replace
from statistics import median
from typing import Any, Literal

from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import whole_gram
from sapmerge.core.part import part, prepare, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.shared_subspace import Shared, block, convex, leave_one_out, plateau
from sapmerge.core.stream import Mapped
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError, SapmergeWarning
from sapmerge.parts.mergers.linear import reweighed

__all__ = ["FlagContaminated"]

_TESTS = ("shared", "norm", "anchors")
_ALONE, _SHARING = 3.0, 6.0
"""Random updates have z of about 0 +- 1; a median above _SHARING says that there is
something to share.
"""
_LONG = 3.5
_LARGEST = 1500  # sum of ranks in a layer, for the convex form


@part
class FlagContaminated:
    """Leave adapters out of a method that do not belong to the others;
    the report says who, and which test said so.

    * "shared": CLAIR's question. A robust subspace per layer (`rank` directions that most adapters
      have in common), and for every adapter the energy that it has in the subspace of the *others*,
      as a z-score against random updates. Below 3 it is flagged, if the median of all is above 6;
      else the adapters share no subspace, and nobody is.
    * "norm": the robust z-score of the log norm exceeds 3.5, and the adapter is longer than the
      median.
    * "anchors": with anchors, the loss at base + adapter is above that at the base.

    It cannot see flipped signs (the subspace is the same; `WeighByAgreement` sees them), nor a
    backdoor inside the shared subspace. A test that would flag half of the adapters or more says
    nothing. Fewer than three adapters cannot be told apart.

    Args:
        method: any method.
        tests: some of "shared", "norm", "anchors".
        rank: of the shared subspaces.
        side: "left" (outputs) or "right" (inputs). LoRA's A starts from one seed in many
            federations, and then the right subspace is shared by everybody, attackers included.
        form: of the test "shared": "leave-one-out", or "convex", the program of low rank + whole
            blocks, which flags shares above 1/2 and needs nearly all of every adapter's energy in
            the subspace.
        price: of the convex form; None: the middle of the longest run of prices that flag
            the same adapters.

    Warns:
        SapmergeWarning: names the flagged.

    Source: He et al., "Federated LoRA fine-tuning for LLMs via collaborative alignment" (CLAIR),
    https://arxiv.org/abs/2605.21217. The calibrated test is ours: the paper's program fails as soon
    as half of an adapter's energy is its own.
    """

    method: Method
    tests: tuple[str, ...] = _TESTS
    rank: int = 2
    side: Literal["left", "right"] = "left"
    form: Literal["leave-one-out", "convex"] = "leave-one-out"
    price: float | None = None
    factors: tuple[float, ...] | None = field(default=None, repr=False)
    found: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    bases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    def __post_init__(self) -> None:
        unknown = [test for test in self.tests if test not in _TESTS]
        if unknown or not self.tests:
            raise MethodError(f"the tests are some of {_TESTS}; got {self.tests!r}")
        if self.rank < 1:
            raise MethodError(f"rank is a number from 1 on; got {self.rank!r}")

    def prepare(self, layers: LayerStream) -> FlagContaminated:
        gram, one = whole_gram(layers)
        if one is None:
            return replace(self, factors=())
        norms = gram.diagonal().clamp_min(0).sqrt()
        asked = [k for k in range(len(one)) if one.weights[k] != 0 and norms[k] > 0]
        findings: dict[str, Any] = {"contaminated": {}}
        bases: Mapping[str, Tensor] = {}
        fired: dict[int, list[str]] = {}
        if len(asked) >= 3:
            if "shared" in self.tests:
                shared = self._shared(layers, asked)
                bases = shared.bases
                name = "shared_z" if self.form == "leave-one-out" else "own_share"
                findings[name] = {one.adapters[k]: z for k, z in shared.score.items()}
                findings["subspace"] = {
                    layer: {"rank": U.shape[1], "energy": shared.energy[layer]}
                    for layer, U in bases.items()
                }
                self._fire("shared", self._apart(shared), asked, fired)
            if "norm" in self.tests:
                self._fire("norm", _long(norms, asked), asked, fired)
            if "anchors" in self.tests:
                self._fire("anchors", _worse_than_the_base(layers, asked), asked, fired)
        factors = [0.0 if k in fired else 1.0 for k in range(len(one))]
        scores: Mapping[str, float] = findings.get("shared_z", findings.get("own_share", {}))
        findings["contaminated"] = {
            one.adapters[k]: {"tests": tests, "score": scores.get(one.adapters[k])}
            for k, tests in fired.items()
        }
        if fired:
            named = ", ".join(
                f"{one.adapters[k]!r} ({' and '.join(tests)})" for k, tests in sorted(fired.items())
            )
            warnings.warn(
                f"left out as contaminated: {named} (FlagContaminated)",
                SapmergeWarning,
                stacklevel=3,
            )
        done = replace(self, factors=tuple(factors), found=findings, bases=bases)
        return replace(
            done, method=prepare(self.method, Mapped(layers, done._without, layers.anchors))
        )

    def __call__(self, layer: Layer) -> Update:
        if self.factors is None:
            raise unprepared(self)
        return self.method(self._without(layer))

    @property
    def findings(self) -> Mapping[str, Any]:
        """Notes of a report: "contaminated" (label -> tests that fired, score), "shared_z",
        "subspace".
        """
        return self.found

    def _without(self, layer: Layer) -> Layer:
        weights = tuple(
            w * factor for w, factor in zip(layer.weights, self.factors or (), strict=True)
        )
        return reweighed(layer, weights)

    @staticmethod
    def _fire(test: str, flagged: list[int], asked: list[int], fired: dict[int, list[str]]) -> None:
        if 2 * len(flagged) < len(asked):
            for k in flagged:
                fired.setdefault(k, []).append(test)

    def _shared(self, layers: LayerStream, asked: list[int]) -> Shared:
        blocks: dict[str, dict[int, Tensor]] = {}
        for layer in layers:
            own = {
                k: block(layer.updates[k], self.side == "left")
                for k in asked
                if layer.updates[k].rank
            }
            present = {k: F for k, F in own.items() if F is not None}
            if len(present) >= 2:
                blocks[layer.name] = present
                if self.form == "convex" and sum(F.shape[1] for F in present.values()) > _LARGEST:
                    raise MethodError(
                        f"layer {layer.name!r}: ranks sum to more than {_LARGEST}, too many for "
                        "form='convex'; use 'leave-one-out'"
                    )
        if not blocks:
            return Shared({}, {}, {})
        if self.form == "leave-one-out":
            return leave_one_out(blocks, self.rank)
        return plateau(blocks) if self.price is None else convex(blocks, self.price)

    def _apart(self, shared: Shared) -> list[int]:
        if self.form == "convex":
            return [k for k, own in shared.score.items() if own > 0.5]
        if not shared.score or median(shared.score.values()) <= _SHARING:
            return []
        return [k for k, z in shared.score.items() if z < _ALONE]


def _long(norms: Tensor, asked: list[int]) -> list[int]:
    logs = {k: float(norms[k].log()) for k in asked}
    middle = median(logs.values())
    spread = max(1.4826 * median(abs(value - middle) for value in logs.values()), 0.1)
    return [k for k, value in logs.items() if (value - middle) / spread > _LONG]


def _worse_than_the_base(layers: LayerStream, asked: list[int]) -> list[int]:
    if layers.anchors is None:
        return []
    base, losses = layers.anchors.loss_of({}), layers.anchors.losses()
    return [k for k in asked if losses[k] > base]
