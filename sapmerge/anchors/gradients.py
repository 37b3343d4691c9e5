"""The gradient of one layer, seen through products with its two sides: G = dL/dW = sum over tokens of g x^T.

A layer y = W x sees inputs x and, going back, gradients g = dL/dy. Every unit and every basis needs only products of
G with something thin, and those are products of x and g: no (m, n) matrix is formed unless a unit asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sapmerge.bases import Frames
from sapmerge.errors import AnchorError

__all__ = ["TokenGradient", "token_gradient"]


@dataclass(frozen=True)
class TokenGradient:
    """G of every sample: G[s] = sum_t g[s, t] x[s, t]^T. A `GradientView`.

    Args:
        x: (samples, tokens, n) inputs.
        g: (samples, tokens, m) gradients of the loss with respect to the outputs.
        columns: for an embedding: which columns of the (m, width) gradient the n columns of x stand for.
        width: their number, if `columns` is given.
    """

    x: Tensor
    g: Tensor
    columns: Tensor | None = None
    width: int = 0

    def left(self, B: Tensor) -> Tensor:
        """B^T G: (samples, r, n)."""
        return self._spread((self.g @ B.to(self.g)).mT @ self.x)

    def right(self, A: Tensor) -> Tensor:
        """G A^T: (samples, m, r)."""
        return self.g.mT @ (self.x @ self._columns_of(A).T)

    def diagonal(self, U: Tensor, Vh: Tensor) -> Tensor:
        """u_i^T G v_i: (samples, k)."""
        return ((self.g @ U.to(self.g)) * (self.x @ self._columns_of(Vh).T)).sum(1)

    def dense(self) -> Tensor:
        """G: (samples, m, n)."""
        return self._spread(self.g.mT @ self.x)

    def inside(self, frames: Sequence[Frames]) -> TokenGradient:
        """The gradient in the coordinates of nested frames: D = U diag(s) C V^T has dL/dC = diag(s) U^T G V."""
        seen = self
        for frame in frames:
            if frame.U is not None:
                seen = replace(seen, g=seen.g @ (frame.U if frame.scale is None else frame.U * frame.scale).to(seen.g))
            if frame.V is not None:
                seen = TokenGradient(seen.x @ seen._columns_of(frame.V.T).T, seen.g)
        return seen

    def samples(self, index: slice) -> TokenGradient:
        """Some of the samples."""
        return replace(self, x=self.x[index], g=self.g[index])

    def together(self) -> TokenGradient:
        """All samples as one: its G is the sum of theirs."""
        return replace(self, x=self.x.flatten(0, 1)[None], g=self.g.flatten(0, 1)[None])

    def _columns_of(self, matrix: Tensor) -> Tensor:
        matrix = matrix.to(self.x)
        return matrix if self.columns is None else matrix[:, self.columns]

    def _spread(self, matrix: Tensor) -> Tensor:
        if self.columns is None:
            return matrix
        out = matrix.new_zeros(*matrix.shape[:-1], self.width)
        out[..., self.columns] = matrix
        return out


def token_gradient(module: nn.Module, calls: Sequence[tuple[Tensor, Tensor]], samples: int) -> TokenGradient:
    """The gradient of a module's weight from the (input, gradient of the output) of all its calls in one batch.

    Args:
        module: linear, Conv1D, embedding, or convolution in one or two dimensions.
        calls: one pair per call; a module that is used twice has two.
        samples: the number of samples in the batch. If the first dimension of the input is another number (tokens
            without padding, say), all of them count as one sample.
    """
    if isinstance(module, nn.Embedding):
        return _embedding_gradient(module, calls, samples)
    rows = [_rows(module, x, g) for x, g in calls]
    by_sample = all(len(x) == samples for x, _ in rows)
    shaped = [(x, g) if by_sample else (x.flatten(0, 1)[None], g.flatten(0, 1)[None]) for x, g in rows]
    return TokenGradient(torch.cat([x for x, _ in shaped], 1).float(), torch.cat([g for _, g in shaped], 1).float())


def _rows(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(first dimension, tokens, features) of both sides."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _patches(module, x), g.flatten(2).mT
    if isinstance(module, nn.Conv3d):
        raise AnchorError(
            f"gradients of {type(module).__name__} layers are not supported; leave them out of the adapter"
        )
    return x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """im2col: (samples, positions, channels * kernel)."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise AnchorError(f"gradients of {module} are not supported: padding {module.padding!r} {module.padding_mode}")
    if isinstance(module, nn.Conv1d):
        x = x[:, :, None]
        kernel, stride, padding, dilation = (
            (other, *value) for other, value in zip((1, 1, 0, 1), _settings(module), strict=True)
        )
    else:
        kernel, stride, padding, dilation = _settings(module)
    return functional.unfold(x.float(), kernel, dilation=dilation, padding=padding, stride=stride).mT


def _settings(module: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, ...], ...]:
    return module.kernel_size, module.stride, tuple(int(p) for p in module.padding), module.dilation


def _embedding_gradient(module: nn.Embedding, calls: Sequence[tuple[Tensor, Tensor]], samples: int) -> TokenGradient:
    """Only the rows that were looked up have a gradient: x is one-hot over those."""
    by_sample = all(len(ids) == samples for ids, _ in calls)
    ids = torch.cat([ids.reshape(samples if by_sample else 1, -1) for ids, _ in calls], 1)
    g = torch.cat([g.reshape(samples if by_sample else 1, -1, g.shape[-1]) for _, g in calls], 1).float()
    found = torch.unique(ids, return_inverse=True)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    columns, position = cast("tuple[Tensor, Tensor]", found)
    return TokenGradient(functional.one_hot(position, len(columns)).float(), g, columns, module.num_embeddings)
