"""Visual domains made from grey 8 x 8 digits: one generic style,
and four that the base model never sees.

A style is a function (strokes, generator) -> images in [0, 1]. Every two of the four share a
factor, so that three sources hold something of use for the fourth: a cloudy ground (ink, chalk,
colour), grain (chalk, colour, outline), and a marked contour (ink, outline).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["DOMAINS", "SIZE", "Style", "generic", "render"]

SIZE = 32
"""Side of the rendered images, in pixels."""

Style: TypeAlias = Callable[[Tensor, Generator], Tensor]
"""(strokes (n, 1, SIZE, SIZE) in [0, 1], generator) -> images (n, 3, SIZE, SIZE) in [0, 1]."""


def render(digits: Tensor, style: Style, generator: Generator) -> Tensor:
    """Draw digits in a style, each a little turned, scaled and moved.

    Args:
        digits: (n, 8, 8) in [0, 1].
        style: `generic`, or one of `DOMAINS`.
        generator: the only source of randomness.

    Returns:
        (n, 3, SIZE, SIZE) in [-1, 1], what the vision tower takes.
    """
    return style(_strokes(digits, generator), generator) * 2 - 1


def generic(strokes: Tensor, generator: Generator) -> Tensor:
    """Any grey on any other grey, in both polarities, with a little noise."""
    n = len(strokes)
    paper = _uniform(n, 0.0, 1.0, generator)
    contrast = _uniform(n, 0.35, 0.9, generator)
    ink = torch.where(paper > 0.5, paper - contrast, paper + contrast)
    return _over(strokes, ink, paper, _noise(strokes, 0.04, generator))


def _ink(strokes: Tensor, generator: Generator) -> Tensor:
    """Black ink on stained paper, or white ink on stained black paper:
    full along its edge and thin inside.
    """
    n = len(strokes)
    white = _uniform(n, 0.0, 1.0, generator) < 0.5
    tint = torch.tensor([1.0, 0.93, 0.78]).view(1, 3, 1, 1)
    clouds, ink = _clouds(n, generator), _uniform(n, 0.0, 0.2, generator)
    paper = torch.where(white, 0.5 * clouds, 1.0 - 0.5 * clouds) * tint
    return _over(
        _hollow(strokes, _uniform(n, 0.3, 0.8, generator)),
        torch.where(white, 1.0 - ink, ink),
        paper,
    )


def _chalk(strokes: Tensor, generator: Generator) -> Tensor:
    """Chalk on a wiped board: light and grainy strokes, thin inside, on a cloudy dark ground."""
    n = len(strokes)
    tint = torch.tensor([0.75, 1.0, 0.85]).view(1, 3, 1, 1)
    board = 0.5 * _clouds(n, generator) * tint
    worn = _hollow(strokes, _uniform(n, 0.5, 1.0, generator))
    return _over(worn * _grain(strokes, 0.2, generator), _uniform(n, 0.8, 1.0, generator), board)


def _colour(strokes: Tensor, generator: Generator) -> Tensor:
    """One colour on a cloudy texture of two others, lighter or darker than it, with grain."""
    n = len(strokes)
    hue, lighter = _uniform(n, 0.0, 1.0, generator), _uniform(n, 0.0, 1.0, generator) < 0.5
    clouds = _clouds(n, generator)
    ground = clouds * _paint(hue + 0.35) + (1 - clouds) * _paint(hue + 0.65)
    ink, ground = (
        torch.where(lighter, 1.0, 0.5) * _paint(hue),
        torch.where(lighter, 0.6, 1.0) * ground,
    )
    return _over(
        strokes * _grain(strokes, 0.3, generator), ink, ground, _noise(strokes, 0.06, generator)
    )


def _outline(strokes: Tensor, generator: Generator) -> Tensor:
    """Only the contour, drawn with a grainy line, light on dark or dark on light."""
    n = len(strokes)
    paper, contrast = _uniform(n, 0.0, 1.0, generator), _uniform(n, 0.5, 0.9, generator)
    ink = torch.where(paper > 0.5, paper - contrast, paper + contrast)
    return _over(_hollow(strokes, 0.0) * _grain(strokes, 0.3, generator), ink, paper)


DOMAINS: Mapping[str, Style] = MappingProxyType(
    {"ink": _ink, "chalk": _chalk, "colour": _colour, "outline": _outline}
)
"""The four domains, by name."""


def _over(alpha: Tensor, front: Tensor, back: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """`front` painted over `back`: (n, 3, SIZE, SIZE) in [0, 1]."""
    return (back + alpha * (front - back) + noise).clamp(0, 1).expand(-1, 3, -1, -1)


def _strokes(digits: Tensor, generator: Generator) -> Tensor:
    """Enlarge to SIZE x SIZE under a small random similarity, with clean edges."""
    n = len(digits)
    angle, zoom = (
        _uniform(n, -0.2, 0.2, generator).view(n),
        _uniform(n, 0.9, 1.15, generator).view(n),
    )
    shift = torch.rand(2, n, generator=generator) * 0.2 - 0.1
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack(
        (torch.stack((cos, -sin, shift[0]), 1), torch.stack((sin, cos, shift[1]), 1)), 1
    )
    grid = F.affine_grid(theta, [n, 1, SIZE, SIZE], align_corners=False)
    large = F.interpolate(digits[:, None], scale_factor=4.0, mode="bicubic", align_corners=False)
    return torch.sigmoid(10 * (F.grid_sample(large, grid, align_corners=False) - 0.5))


def _hollow(strokes: Tensor, inside: Tensor | float) -> Tensor:
    """Strokes whose contour, two pixels wide, is full and whose inside has the given opacity."""
    contour = F.max_pool2d(strokes, 3, 1, 1) + F.max_pool2d(-strokes, 3, 1, 1)
    return torch.maximum(contour, strokes * inside)


def _clouds(n: int, generator: Generator) -> Tensor:
    """Smooth noise in [0, 1]: (n, 1, SIZE, SIZE)."""
    coarse = torch.randn(n, 1, 5, 5, generator=generator)
    return torch.sigmoid(
        1.5 * F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    )


def _grain(like: Tensor, share: float, generator: Generator) -> Tensor:
    """0 for a random share of the pixels, 1 elsewhere."""
    return (torch.rand(like.shape, generator=generator) >= share).to(like.dtype)


def _noise(like: Tensor, scale: float, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator) * scale


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    """One number per image: (n, 1, 1, 1)."""
    return torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low


def _paint(hue: Tensor) -> Tensor:
    """A soft colour for every hue in turns: (n, 3, 1, 1) in [0, 1]."""
    thirds = torch.tensor([0.0, 1 / 3, 2 / 3]).view(1, 3, 1, 1)
    return 0.6 + 0.4 * torch.cos(2 * math.pi * (hue + thirds))
