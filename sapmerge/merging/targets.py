"""Where `apply_to` writes: parameters that are the weights themselves,
each in memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sapmerge.errors import ModelMismatchError
from sapmerge.models import Site

__all__ = ["check_parameters", "check_separate"]


def check_parameters(sites: Mapping[str, Site]) -> None:
    """Refuse weights that are computed anew from something else: what is written to them is lost.

    Raises:
        ModelMismatchError: a weight is no parameter of its module (a parametrisation, weight or
            spectral norm, pruning, a view of a sharded model).
    """
    for name, site in sites.items():
        path, _, last = site.name.rpartition(".")
        owner = site.module.get_submodule(path)
        own = cast("dict[str, nn.Parameter | None]", vars(owner)["_parameters"]).get(last)
        if own is None or not own.is_leaf or own is not site.parameter:
            raise ModelMismatchError(
                f"the weight of {name!r} ({type(owner).__name__}) is computed from other tensors "
                "(a parametrisation, weight norm, pruning or sharding), so what is added to it "
                "would be lost. Make it plain first (e.g. "
                "torch.nn.utils.parametrize.remove_parametrizations), or use save_pretrained"
            )


def check_separate(base: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse to write where something else lies as well: it would change with it.

    Args:
        base: the whole model.
        weights: what is written to, by the name that a message shows.

    Raises:
        ModelMismatchError: a weight shares memory with another tensor of the model or with itself,
            or holds no data.
    """
    for name, weight in weights.items():
        problem = _unwritable(weight)
        if problem:
            raise ModelMismatchError(f"the weight of {name!r} cannot be written to: {problem}")
    mine = {id(weight): name for name, weight in weights.items()}
    for one, other in _meeting(base, mine):
        name = mine.get(id(one.tensor)) or mine[id(other.tensor)]
        raise ModelMismatchError(
            f"the weight of {name!r} is tied ({one.name}, {other.name} lie in the same memory): "
            "writing to it would "
            "change both. Use save_pretrained or add_to, or untie the weights first"
        )


def _unwritable(weight: Tensor) -> str | None:
    if weight.is_meta:
        return (
            "it is on the meta device, without data (offloaded?); load the model with its weights"
        )
    if weight.is_inference():
        return "it was made inside torch.inference_mode(); load the model outside"
    if weight.layout != torch.strided:
        return "it is sparse"
    if weight.dtype.itemsize < 2:
        return (
            f"it is stored as {weight.dtype}, in whose rounding an update is lost; use "
            "save_pretrained, or load the model in bfloat16 or float32"
        )
    reach = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(weight.stride(), weight.shape) if size > 1
    ):
        if stride < reach:
            return (
                "several of its entries lie in one place in memory (an expanded tensor); clone "
                "it first"
            )
        reach += stride * (size - 1)
    return None


class _Span(NamedTuple):
    """The bytes between the first and the last entry of a tensor."""

    place: str
    start: int
    end: int
    name: str
    tensor: Tensor


def _meeting(base: nn.Module, mine: Mapping[int, str]) -> Iterator[tuple[_Span, _Span]]:
    """Pairs of names of which at least one is `mine`, that share an entry."""
    named = [
        *base.named_parameters(remove_duplicate=False),
        *base.named_buffers(remove_duplicate=False),
    ]
    spans = sorted(
        (span for span in (_span(name, tensor) for name, tensor in named) if span),
        key=lambda span: span[:3],
    )
    active: list[_Span] = []
    for span in spans:
        active = [other for other in active if other.place == span.place and other.end > span.start]
        for other in active:
            if (id(span.tensor) in mine or id(other.tensor) in mine) and _share(other, span):
                yield other, span
        active.append(span)


def _span(name: str, tensor: Tensor) -> _Span | None:
    """None for a tensor without memory, or of which nobody can tell."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:
        return None
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape))
    return _Span(str(tensor.device), start, start + reach * tensor.element_size(), name, tensor)


def _share(one: _Span, other: _Span) -> bool:
    """Whether two tensors have a byte in common; views that interleave,
    such as halves of the columns, have none.
    """
    if all(span.end - span.start == span.tensor.nbytes for span in (one, other)):
        return True  # both without gaps
    start = min(one.start, other.start)
    marks = torch.zeros(max(one.end, other.end) - start, dtype=torch.bool)
    _bytes_of(marks, one, start).fill_(True)
    return bool(_bytes_of(marks, other, start).any())


def _bytes_of(marks: Tensor, span: _Span, start: int) -> Tensor:
    """A view of one mark per byte, where the entries of a tensor are."""
    size = span.tensor.element_size()
    places = [
        (n, stride * size)
        for n, stride in zip(span.tensor.shape, span.tensor.stride())
        if stride or n == 1
    ]
    shape, strides = [n for n, _ in places], [stride for _, stride in places]
    return marks.as_strided([*shape, size], [*strides, 1], span.start - start)
