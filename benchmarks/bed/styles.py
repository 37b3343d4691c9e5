"""Domains made from real images: styles, corruptions,
and pictures that take their tones or texture from others.

A style is a function (images (n, 3, s, s) in [0, 1], generator) -> images of the same form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Generator, Tensor
from torch.nn import functional

__all__ = ["CORRUPTIONS", "STYLES", "Style", "rotated", "textured", "toned"]

Style: TypeAlias = Callable[[Tensor, Generator], Tensor]


def _grey(x: Tensor) -> Tensor:
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian, edges reflected."""
    radius = math.ceil(2.5 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    line = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = functional.conv2d(
        functional.pad(x, (radius, radius, 0, 0), "reflect"), line, groups=x.shape[1]
    )
    return functional.conv2d(
        functional.pad(x, (0, 0, radius, radius), "reflect"), line.mT, groups=x.shape[1]
    )


def _slopes(x: Tensor) -> Tensor:
    """The length of the Sobel gradient of the grey image."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    both = functional.conv2d(
        functional.pad(_grey(x), (1, 1, 1, 1), "reflect"), torch.stack([kernel, kernel.T])[:, None]
    )
    return both.square().sum(1, keepdim=True).sqrt()


def _pencil(x: Tensor, _: Generator) -> Tensor:
    """Colour dodge: the grey image divided by its blurred self."""
    grey = _grey(x)
    return (grey / _blur(grey, 3.0).clamp_min(0.05)).clamp(0, 1).square().expand_as(x)


def _posterised(x: Tensor, _: Generator) -> Tensor:
    return (x * 3).round() / 3


def _negative(x: Tensor, _: Generator) -> Tensor:
    return 1 - x


def _night(x: Tensor, generator: Generator) -> Tensor:
    """Dark, blue and grainy."""
    tint = torch.tensor([0.35, 0.45, 0.8]).view(3, 1, 1)
    return (x.pow(1.6) * tint * 0.6 + 0.04 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def _halftone(x: Tensor, _: Generator) -> Tensor:
    """Black dots on a grid of four pixels, larger where it is darker."""
    side = x.shape[-1]
    wave = torch.cos(math.pi * torch.arange(side) / 2)
    screen = (wave[:, None] + wave[None]) / 4 + 0.5
    return torch.sigmoid(12 * (_grey(x) - screen)).expand_as(x)


def _blurred(x: Tensor, _: Generator) -> Tensor:
    return _blur(x, 2.5)


def _edges(x: Tensor, _: Generator) -> Tensor:
    return (1 - 2.5 * _slopes(x)).clamp(0, 1).expand_as(x)


def _oil(x: Tensor, _: Generator) -> Tensor:
    """The median of 7 x 7 pixels, by way of two smaller ones, in few tones."""
    for size in (5, 3):
        around = functional.unfold(functional.pad(x, (size // 2,) * 4, "reflect"), size)
        x = around.unflatten(1, (3, -1)).median(2).values.view_as(x)
    return (x * 6).round() / 6


STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "pencil": _pencil,
        "posterised": _posterised,
        "negative": _negative,
        "night": _night,
        "halftone": _halftone,
        "blurred": _blurred,
        "edges": _edges,
        "oil": _oil,
    }
)


def _levelled(corrupt: Callable[[Tensor, float, Generator], Tensor], *levels: float) -> Style:
    """A corruption at three levels, dealt out to the images in turn."""

    def style(x: Tensor, generator: Generator) -> Tensor:
        out = x.clone()
        for k, level in enumerate(levels):
            out[k :: len(levels)] = corrupt(x[k :: len(levels)], level, generator)
        return out.clamp(0, 1)

    return style


def _pixelated(x: Tensor, factor: float, _: Generator) -> Tensor:
    small = functional.interpolate(x, scale_factor=1 / factor, mode="area")
    return functional.interpolate(small, size=x.shape[-2:], mode="nearest")


def _foggy(x: Tensor, level: float, generator: Generator) -> Tensor:
    coarse = torch.rand(len(x), 1, 4, 4, generator=generator)
    fog = functional.interpolate(coarse, size=x.shape[-2:], mode="bicubic", align_corners=True)
    return x * (1 - level) + level * (0.6 + 0.4 * fog)


CORRUPTIONS: Mapping[str, Style] = MappingProxyType(
    {
        "noise": _levelled(
            lambda x, s, g: x + s * torch.randn(x.shape, generator=g), 0.1, 0.25, 0.5
        ),
        "contrast": _levelled(lambda x, s, _: s * (x - 0.5) + 0.5, 0.5, 0.25, 0.12),
        "pixelated": _levelled(_pixelated, 2, 4, 8),
        "fog": _levelled(_foggy, 0.4, 0.6, 0.8),
        "blur": _levelled(lambda x, s, _: _blur(x, s), 1.0, 2.0, 4.0),
    }
)


def toned(donors: Tensor, share: float = 0.08) -> Style:
    """The low frequencies' amplitudes of other pictures,
    under the image's own phases (Yang and Soatto, 2020).

    Args:
        donors: (m, 3, s, s) in [0, 1].
        share: of the spectrum's side that is swapped, around its centre.
    """

    def style(x: Tensor, generator: Generator) -> Tensor:
        chosen = donors[torch.randint(len(donors), (len(x),), generator=generator)]
        own, other = torch.fft.fft2(x), torch.fft.fft2(chosen).abs()
        frequencies = torch.fft.fftfreq(x.shape[-1]).abs() <= share / 2
        low = frequencies[:, None] & frequencies[None]
        amplitude = torch.where(low, other, own.abs())
        return torch.fft.ifft2(torch.polar(amplitude, own.angle())).real.clamp(0, 1)

    return style


def textured(textures: Tensor) -> Style:
    """The image's smooth tones times the fine detail of a texture.

    Args:
        textures: (m, 3, s, s) in [0, 1].
    """
    grey = _grey(textures)
    detail = grey - _blur(grey, 4.0)
    detail = detail / detail.std((1, 2, 3), keepdim=True)

    def style(x: Tensor, generator: Generator) -> Tensor:
        chosen = detail[torch.randint(len(detail), (len(x),), generator=generator)]
        return (_blur(x, 1.5) + 0.12 * chosen).clamp(0, 1)

    return style


def rotated(degrees: float) -> Style:
    """Turned about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def style(x: Tensor, _: Generator) -> Tensor:
        turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(x), 2, 3)
        grid = functional.affine_grid(turn, list(x.shape), align_corners=False)
        return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)

    return style
