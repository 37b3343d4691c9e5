"""Recipes read back as methods, with `ast` and a closed table of names:
nothing is evaluated or imported.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, cast

from sapmerge import contrib, losses, methods
from sapmerge.errors import MethodError
from sapmerge.parts.bases import CoreSpace, SharedBasis, TuckerSpace
from sapmerge.parts.chances import Flip, MagnitudeChance, RankChance
from sapmerge.parts.contaminated import FlagContaminated
from sapmerge.parts.masks import (
    DropOutliers,
    NtoM,
    PerRow,
    Reciprocal,
    Threshold,
    TopFraction,
    TopWithTies,
)
from sapmerge.parts.mergers.cover_space import InCoverSpace
from sapmerge.parts.mergers.entrywise import CoordinateMedian, TrimmedMean
from sapmerge.parts.mergers.factors import ClusterUnits, RobustFactors, RobustSum
from sapmerge.parts.mergers.fisher import FisherMean
from sapmerge.parts.mergers.linear import (
    DisjointMax,
    DisjointMean,
    FactorMean,
    FactorSum,
    Mean,
    Sum,
)
from sapmerge.parts.mergers.regmean import RegMean
from sapmerge.parts.mergers.robust import GeometricMedian, Krum, ModelStock, Slerp
from sapmerge.parts.mergers.spectral import CART, Decorrelate, Isotropic, IsotropicCommonSpecific
from sapmerge.parts.outliers import CapShare, ClipNorms, ExcludeOutliers
from sapmerge.parts.prune import Prune
from sapmerge.parts.rescalers import Divide, Keep, MatchNorm
from sapmerge.parts.scaling import MatchEnergy, ScaleByAnchors, ScaleByDepth
from sapmerge.parts.scorers import (
    SNIP,
    Activation,
    Magnitude,
    PerSampleTaylor,
    Random,
    SecondOrder,
    SignedTaylor,
    Taylor,
)
from sapmerge.parts.transforms import (
    Consensus,
    ElectSign,
    RoundOff,
    Select,
    SmoothSpectrum,
    WeighByEnergy,
)
from sapmerge.parts.tuning import Tune
from sapmerge.parts.units import Directions, Entries, Factors, Layers
from sapmerge.parts.weighting import WeighByAgreement, WeighByAnchors
from sapmerge.parts.wrappers import ByModule, Chain, In

__all__ = ["CALLABLE", "parse"]

CALLABLE: Mapping[str, Callable[..., Any]] = {
    made.__name__: made
    for made in (
        Activation,
        ByModule,
        CART,
        CapShare,
        Chain,
        ClipNorms,
        ClusterUnits,
        Consensus,
        CoordinateMedian,
        CoreSpace,
        Decorrelate,
        Directions,
        DisjointMax,
        DisjointMean,
        Divide,
        DropOutliers,
        ElectSign,
        Entries,
        ExcludeOutliers,
        FactorMean,
        FactorSum,
        Factors,
        SecondOrder,
        FisherMean,
        FlagContaminated,
        Flip,
        GeometricMedian,
        In,
        InCoverSpace,
        Isotropic,
        IsotropicCommonSpecific,
        Keep,
        Krum,
        Layers,
        Magnitude,
        MagnitudeChance,
        MatchEnergy,
        MatchNorm,
        Mean,
        ModelStock,
        NtoM,
        PerRow,
        PerSampleTaylor,
        Prune,
        Random,
        RankChance,
        Reciprocal,
        RegMean,
        RobustFactors,
        RobustSum,
        RoundOff,
        SNIP,
        ScaleByAnchors,
        ScaleByDepth,
        Select,
        SharedBasis,
        SignedTaylor,
        Slerp,
        SmoothSpectrum,
        Sum,
        Taylor,
        Threshold,
        TopFraction,
        TopWithTies,
        TrimmedMean,
        TuckerSpace,
        Tune,
        WeighByAgreement,
        WeighByAnchors,
        WeighByEnergy,
    )
} | {name: getattr(package, name) for package in (methods, contrib) for name in package.__all__}
"""What a recipe may call: every primitive and wrapper, and every named method."""


def parse(text: str, functions: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The method that a recipe describes.

    Args:
        text: e.g. "ties(density=0.2)" or "Chain(Prune(Magnitude(), TopFraction(0.2)), Mean())".
        functions: your own functions, by the "module:qualname" under which the recipe names them.

    Raises:
        MethodError: a name that is not public, a function that was not passed,
            or anything but calls and literals.

    Example:
        >>> import sapmerge as sm
        >>> sm.parse("Chain(Mean())")
        Chain(Mean())
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, functions or {}, text[:200])
    except MethodError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MethodError(f"the recipe {text[:200]!r} is not Python syntax: {error}") from None


def _build(node: ast.expr, functions: Mapping[str, Callable[..., Any]], text: str) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            made = _public(name, text)
            positional = [_build(argument, functions, text) for argument in node.args]
            if any(keyword.arg is None for keyword in node.keywords):
                raise MethodError(f"the recipe {text!r} uses **, which is not allowed")
            named = {
                str(keyword.arg): _build(keyword.value, functions, text)
                for keyword in node.keywords
            }
            try:
                return made(*positional, **named)
            except TypeError as error:
                raise MethodError(f"the recipe {text!r} calls {name} wrongly: {error}") from None
        case ast.Constant(value=str() as name) if ":" in name:
            if name not in functions:
                raise MethodError(
                    f"the recipe names the function {name!r}; pass it yourself: "
                    f"parse(text, functions={{{name!r}: f}})"
                )
            return functions[name]
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Name(id=name):
            return _loss(name, text)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return tuple(_build(element, functions, text) for element in elements)
        case ast.Dict(keys=keys, values=values) if all(
            isinstance(key, ast.Constant) for key in keys
        ):
            return {
                _build(cast("ast.expr", key), functions, text): _build(value, functions, text)
                for key, value in zip(keys, values, strict=True)
            }
        case _:
            raise MethodError(
                f"the recipe {text!r} contains a {type(node).__name__}; only calls of public "
                "names and literals are read"
            )


def _loss(name: str, text: str) -> Callable[..., Any]:
    if name not in losses.NAMED:
        raise MethodError(
            f"the recipe {text!r} uses the bare name {name!r}; only losses stand without "
            "parentheses"
        )
    return losses.NAMED[name]


def _public(name: str, text: str) -> Callable[..., Any]:
    if name not in CALLABLE:
        raise MethodError(
            f"the recipe {text!r} uses {name!r}, which is not a public primitive or method of "
            "sapmerge"
        )
    return CALLABLE[name]
