"""The gradient of one layer, seen through products with its two sides:
G = dL/dW = sum over tokens of g x^T.

A layer y = W x sees inputs x and, going back, gradients g = dL/dy. Every unit and every basis needs
only products of G with something thin, and those are products of x and g:
no (m, n) matrix is formed unless a unit asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sapmerge.core.frames import Frames
from sapmerge.core.linalg import wide
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import AnchorError

__all__ = ["Call", "TokenGradient", "embed_scale", "token_gradient"]

Call = tuple[Tensor, Tensor]
"""(input, gradient of the output) of one call of a module."""


@dataclass(frozen=True, eq=False)
class TokenGradient:
    """G of every sample: G[s] = sum_t g[s, t] x[s, t]^T. A `GradientView`.

    Args:
        x: (samples, tokens, n) inputs; for an embedding (samples, tokens) row numbers, which stand
            for one-hot inputs.
        g: (samples, tokens, m) gradients of the loss with respect to the outputs.
        rows: for an embedding: how many rows it has (n).
    """

    x: Tensor
    g: Tensor
    rows: int | None = None

    def left(self, B: Tensor) -> Tensor:
        """B^T G: (samples, r, n)."""
        return self._times_x(self.g @ B.to(self.g))

    def right(self, A: Tensor) -> Tensor:
        """G A^T: (samples, m, r)."""
        return (self._through(A).mT @ self.g).mT

    def diagonal(self, U: Tensor, Vh: Tensor) -> Tensor:
        """u_i^T G v_i: (samples, k)."""
        return ((self.g @ U.to(self.g)) * self._through(Vh)).sum(1)

    def dense(self) -> Tensor:
        """G: (samples, m, n)."""
        return self._times_x(self.g)

    def along(self, updates: Sequence[Update]) -> Tensor:
        """<G, D> of the first sample for each update D: (K,), in float64 on the CPU."""
        vectors = [
            self.diagonal(update.B, update.A)[0].double().sum()
            if isinstance(update, LowRank)
            else (self.dense()[0].double() * update.matrix.to(self.g).double()).sum()
            for update in updates
        ]
        return torch.stack(vectors).cpu()

    def inside(self, frames: Sequence[Frames]) -> TokenGradient:
        """The gradient in the coordinates of nested frames:
        D = U diag(s) C V^T has dL/dC = diag(s) U^T G V.
        """
        seen = self
        for frame in frames:
            if frame.U is not None:
                seen = replace(
                    seen,
                    g=seen.g
                    @ (frame.U if frame.scale is None else frame.U * frame.scale).to(seen.g),
                )
            if frame.V is not None:
                seen = TokenGradient(seen._through(frame.V.T), seen.g)
        return seen

    def samples(self, index: slice) -> TokenGradient:
        """Some of the samples."""
        return replace(self, x=self.x[index], g=self.g[index])

    def together(self) -> TokenGradient:
        """All samples as one: its G is the sum of theirs."""
        return replace(self, x=self.x.flatten(0, 1)[None], g=self.g.flatten(0, 1)[None])

    def _through(self, matrix: Tensor) -> Tensor:
        """x M^T: (samples, tokens, k) for M (k, n)."""
        matrix = matrix.to(self.g)
        return self.x @ matrix.T if self.rows is None else matrix.T[self.x]

    def _times_x(self, h: Tensor) -> Tensor:
        """sum_t h[s, t] x[s, t]^T: (samples, k, n) for h (samples, tokens, k)."""
        if self.rows is None:
            return h.mT @ self.x
        sums = h.new_zeros(len(h), self.rows, h.shape[-1])
        sample = torch.arange(len(h), device=h.device)[:, None].expand_as(self.x)
        return sums.index_put_((sample, self.x), h, accumulate=True).mT


def token_gradient(
    module: nn.Module, calls: Sequence[Call], samples: int, loss_scale: float = 1.0
) -> TokenGradient:
    """The gradient of a module's weight from the (input, gradient of the output) of all its
    calls in one batch.

    Args:
        module: linear, Conv1D, embedding, or convolution in one or two dimensions.
        calls: one pair per call; a module that is used twice has two.
        samples: the number of samples in the batch. If the first dimension of the input is another
            number (tokens without padding, say), all of them count as one sample.
        loss_scale: what the loss was multiplied by.
    """
    embeds = isinstance(module, nn.Embedding)
    shape = _looked_up if embeds else _rows
    shaped = [
        shape(module, x, wide(g) if loss_scale == 1 else wide(g) / loss_scale) for x, g in calls
    ]
    if not all(len(x) == samples for x, _ in shaped):
        shaped = [(x.flatten(0, 1)[None], g.flatten(0, 1)[None]) for x, g in shaped]
    x, g = (
        shaped[0]
        if len(shaped) == 1
        else (torch.cat(side, 1) for side in zip(*shaped, strict=True))
    )
    return TokenGradient(x, g, module.num_embeddings if embeds else None)


def embed_scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows by; 1 for most."""
    scale = cast("Tensor | float | None", getattr(module, "embed_scale", None))
    return 1.0 if scale is None else float(scale)


def _rows(module: nn.Module, x: Tensor, g: Tensor) -> Call:
    """(first dimension, tokens, features) of both sides."""
    x = x.to(g.dtype)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        spatial = len(module.kernel_size)
        x, g = (side if side.ndim == spatial + 2 else side[None] for side in (x, g))
        return _patches(module, x), g.flatten(2).mT
    if isinstance(module, nn.Conv3d):
        raise AnchorError(
            f"gradients of {type(module).__name__} layers are not supported; leave them out of the "
            "adapter"
        )
    return x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1]), g.reshape(
        len(g) if g.ndim > 1 else 1, -1, g.shape[-1]
    )


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """im2col: (samples, positions, channels * kernel)."""
    padding = cast("Callable[[], list[int]] | list[int]", module._reversed_padding_repeated_twice)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    x = functional.pad(
        x,
        cast("list[int]", padding),
        "constant" if module.padding_mode == "zeros" else module.padding_mode,
    )
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv1d):
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    return functional.unfold(x, kernel, dilation=dilation, stride=stride).mT


def _looked_up(module: nn.Module, ids: Tensor, g: Tensor) -> Call:
    """Row numbers and gradients; the padding row has no gradient, as in autograd."""
    padding = cast("int | None", module.padding_idx)
    g = g * embed_scale(module)
    if padding is not None:
        g = g.masked_fill((ids == padding)[..., None], 0.0)
    first = len(ids) if ids.ndim > 1 else 1
    return ids.reshape(first, -1), g.reshape(first, -1, g.shape[-1])
