"""sapmerge merges LoRA adapters: `merge(adapters, anchor_loader, model)`,
made of composable primitives.

The names below are the public surface, each imported when it is first used: neither `import
sapmerge` nor `sapmerge --help` waits for torch. The folders are sentences of the README: `core`
(updates and layers), `parts` (the primitives), `anchors` (gradients and losses), `io` (files),
`methods` and `contrib` (the named methods), `merging` (how a merge runs), `routing` (adapters that
stay apart). `merging/merge.py` is the place to start reading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers, editors and the reference: the names of sapmerge.public
    from sapmerge import anchors as anchors
    from sapmerge import contrib as contrib
    from sapmerge import methods as methods
    from sapmerge import evaluation as evaluation
    from sapmerge import federated as federated
    from sapmerge.anchors.anchors import Anchors as Anchors
    from sapmerge.anchors.loading import from_pairs as from_pairs
    from sapmerge.comparing import (
        Comparison as Comparison,
        MethodResult as MethodResult,
        SearchResult as SearchResult,
        compare as compare,
        search as search,
    )
    from sapmerge.contrib import *
    from sapmerge.core.frames import Frames as Frames
    from sapmerge.core.layer import Layer as Layer, Member as Member
    from sapmerge.core.part import on_one_layer as on_one_layer, prepare as prepare
    from sapmerge.core.protocols import (
        AnchorPass as AnchorPass,
        Basis as Basis,
        Coordinates as Coordinates,
        GradientView as GradientView,
        LayerStream as LayerStream,
        MaskBuilder as MaskBuilder,
        Merger as Merger,
        Method as Method,
        Observation as Observation,
        Rescaler as Rescaler,
        Scorer as Scorer,
        Stats as Stats,
        Transform as Transform,
        Units as Units,
    )
    from sapmerge.core.stream import Mapped as Mapped, Stream as Stream
    from sapmerge.core.updates import (
        Dense as Dense,
        LowRank as LowRank,
        Update as Update,
        absent as absent,
    )
    from sapmerge.errors import (
        AdapterConfigError as AdapterConfigError,
        AdapterFormatError as AdapterFormatError,
        AdapterSecurityError as AdapterSecurityError,
        AnchorError as AnchorError,
        IncompatibleAdaptersError as IncompatibleAdaptersError,
        InputChangedError as InputChangedError,
        LimitExceededError as LimitExceededError,
        MethodError as MethodError,
        ModelMismatchError as ModelMismatchError,
        NonFiniteError as NonFiniteError,
        OutputError as OutputError,
        OutputExistsError as OutputExistsError,
        RoundError as RoundError,
        SapmergeError as SapmergeError,
        SapmergeWarning as SapmergeWarning,
    )
    from sapmerge.io.adapter import Adapter as Adapter
    from sapmerge.io.files import Limits as Limits
    from sapmerge.io.formats.convert import Converted as Converted, convert as convert
    from sapmerge.io.modules import Module as Module, SavedTensor as SavedTensor
    from sapmerge.losses import (
        alignment as alignment,
        centered_alignment as centered_alignment,
        contrastive as contrastive,
        entropy as entropy,
        language_modeling as language_modeling,
        outputs_only as outputs_only,
    )
    from sapmerge.merging.inspection import (
        AdapterSummary as AdapterSummary,
        Inspection as Inspection,
        LayerSummary as LayerSummary,
        inspect as inspect,
    )
    from sapmerge.merging.merge import Merged as Merged, merge as merge
    from sapmerge.merging.serving import check as check
    from sapmerge.merging.verification import reproduce as reproduce, verify as verify
    from sapmerge.methods import *
    from sapmerge.parsing import parse as parse
    from sapmerge.parts.bases import (
        CoreSpace as CoreSpace,
        SharedBasis as SharedBasis,
        TuckerSpace as TuckerSpace,
    )
    from sapmerge.parts.chances import (
        Flip as Flip,
        MagnitudeChance as MagnitudeChance,
        RankChance as RankChance,
    )
    from sapmerge.parts.contaminated import FlagContaminated as FlagContaminated
    from sapmerge.parts.masks import (
        DropOutliers as DropOutliers,
        NtoM as NtoM,
        PerRow as PerRow,
        Reciprocal as Reciprocal,
        Threshold as Threshold,
        TopFraction as TopFraction,
        TopWithTies as TopWithTies,
    )
    from sapmerge.parts.mergers.cover_space import InCoverSpace as InCoverSpace
    from sapmerge.parts.mergers.entrywise import (
        CoordinateMedian as CoordinateMedian,
        TrimmedMean as TrimmedMean,
    )
    from sapmerge.parts.mergers.factors import (
        ClusterUnits as ClusterUnits,
        RobustFactors as RobustFactors,
        RobustSum as RobustSum,
    )
    from sapmerge.parts.mergers.fisher import FisherMean as FisherMean
    from sapmerge.parts.mergers.linear import (
        DisjointMax as DisjointMax,
        DisjointMean as DisjointMean,
        FactorMean as FactorMean,
        FactorSum as FactorSum,
        Mean as Mean,
        Sum as Sum,
    )
    from sapmerge.parts.mergers.regmean import RegMean as RegMean
    from sapmerge.parts.mergers.robust import (
        GeometricMedian as GeometricMedian,
        Krum as Krum,
        ModelStock as ModelStock,
        Slerp as Slerp,
    )
    from sapmerge.parts.mergers.spectral import (
        CART as CART,
        Decorrelate as Decorrelate,
        Isotropic as Isotropic,
        IsotropicCommonSpecific as IsotropicCommonSpecific,
    )
    from sapmerge.parts.outliers import (
        CapShare as CapShare,
        ClipNorms as ClipNorms,
        ExcludeOutliers as ExcludeOutliers,
    )
    from sapmerge.parts.prune import Prune as Prune
    from sapmerge.parts.rescalers import Divide as Divide, Keep as Keep, MatchNorm as MatchNorm
    from sapmerge.parts.scaling import (
        MatchEnergy as MatchEnergy,
        ScaleByAnchors as ScaleByAnchors,
        ScaleByDepth as ScaleByDepth,
    )
    from sapmerge.parts.scorers import (
        SNIP as SNIP,
        Activation as Activation,
        SecondOrder as SecondOrder,
        Magnitude as Magnitude,
        PerSampleTaylor as PerSampleTaylor,
        Random as Random,
        SignedTaylor as SignedTaylor,
        Taylor as Taylor,
    )
    from sapmerge.parts.transforms import (
        Consensus as Consensus,
        ElectSign as ElectSign,
        RoundOff as RoundOff,
        Select as Select,
        SmoothSpectrum as SmoothSpectrum,
        WeighByEnergy as WeighByEnergy,
    )
    from sapmerge.parts.tuning import Tune as Tune
    from sapmerge.parts.units import (
        Directions as Directions,
        Entries as Entries,
        Factors as Factors,
        Layers as Layers,
    )
    from sapmerge.parts.weighting import (
        WeighByAgreement as WeighByAgreement,
        WeighByAnchors as WeighByAnchors,
    )
    from sapmerge.parts.wrappers import ByModule as ByModule, Chain as Chain, In as In
    from sapmerge.routing.routed import Routed as Routed, routed as routed
    from sapmerge.routing.routers import (
        ArrowRouter as ArrowRouter,
        FixedRouter as FixedRouter,
        LearnedRouter as LearnedRouter,
    )
    from sapmerge.version import __version__ as __version__

else:  # to a type checker a `__getattr__` would say that every name exists
    from importlib import import_module as _import_module

    from sapmerge import public as _public

    def __getattr__(name: str) -> object:
        """A public name or a module of the package, imported when it is first used (PEP 562)."""
        if name in _public.MODULES:
            return _import_module(f"sapmerge.{name}")
        if name == "__all__":
            found = [
                *_public.HOMES,
                *(n for m in _public.METHODS for n in _import_module(m).__all__),
            ]
        elif name in _public.HOMES:
            found = getattr(_import_module(_public.HOMES[name]), name)
        else:
            found = _method(name)
        globals()[name] = found
        return found

    def _method(name: str) -> object:
        if not name.startswith("_"):
            for package in map(_import_module, _public.METHODS):
                if name in package.__all__:
                    return getattr(package, name)
        raise AttributeError(f"module 'sapmerge' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_public.MODULES, *__getattr__("__all__")})
