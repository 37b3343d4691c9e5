"""sapmerge merges LoRA adapters: `merge(adapters, anchor_loader, model)`,
made of composable primitives.

The names below are the public surface. The folders are sentences of the README: `core` (updates and
layers), `parts` (the primitives), `anchors` (gradients and losses), `io` (files), `methods` and
`contrib` (the named methods), `merging` (how a merge runs), `routing` (adapters that stay apart).
`merging/merge.py` is the place to start reading.
"""

from sapmerge import anchors as anchors
from sapmerge import contrib, methods
from sapmerge import evaluation as evaluation
from sapmerge import federated as federated
from sapmerge.anchors.anchors import Anchors
from sapmerge.anchors.loading import from_pairs
from sapmerge.comparing import Comparison, MethodResult, compare
from sapmerge.contrib import *
from sapmerge.core.frames import Frames
from sapmerge.core.layer import Layer, Member
from sapmerge.core.part import on_one_layer, prepare
from sapmerge.core.protocols import (
    AnchorPass,
    Basis,
    Coordinates,
    GradientView,
    LayerStream,
    MaskBuilder,
    Merger,
    Method,
    Observation,
    Rescaler,
    Scorer,
    Stats,
    Transform,
    Units,
)
from sapmerge.core.stream import Mapped, Stream
from sapmerge.core.updates import Dense, LowRank, Update, absent
from sapmerge.errors import (
    AdapterConfigError,
    AdapterFormatError,
    AdapterSecurityError,
    AnchorError,
    IncompatibleAdaptersError,
    InputChangedError,
    LimitExceededError,
    MethodError,
    ModelMismatchError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    RoundError,
    SapmergeError,
    SapmergeWarning,
)
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import Limits
from sapmerge.io.modules import Module, SavedTensor
from sapmerge.losses import (
    alignment,
    centered_alignment,
    contrastive,
    entropy,
    language_modeling,
    outputs_only,
)
from sapmerge.merging.inspection import AdapterSummary, Inspection, LayerSummary, inspect
from sapmerge.merging.merge import Merged, merge
from sapmerge.merging.serving import check
from sapmerge.merging.verification import reproduce, verify
from sapmerge.methods import *
from sapmerge.parsing import parse
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
    Fisher,
    Magnitude,
    PerSampleTaylor,
    Random,
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
from sapmerge.routing.routed import Routed, routed
from sapmerge.routing.routers import ArrowRouter, FixedRouter, LearnedRouter
from sapmerge.version import __version__

__all__ = [
    # a merge: adapters in, one adapter out
    "Adapter",
    "AdapterSummary",
    "Comparison",
    "Inspection",
    "LayerSummary",
    "Limits",
    "Merged",
    "Module",
    "MethodResult",
    "SavedTensor",
    "__version__",
    "compare",
    "inspect",
    "check",
    "merge",
    "parse",
    "reproduce",
    "verify",
    # updates, layers, and what each kind of part is
    "AnchorPass",
    "Basis",
    "Coordinates",
    "Dense",
    "Frames",
    "GradientView",
    "Layer",
    "Member",
    "Stream",
    "on_one_layer",
    "LayerStream",
    "LowRank",
    "Mapped",
    "MaskBuilder",
    "Merger",
    "Method",
    "Observation",
    "Rescaler",
    "Scorer",
    "Stats",
    "Transform",
    "Units",
    "Update",
    "absent",
    "prepare",
    # the primitives
    "Activation",
    "ByModule",
    "CART",
    "CapShare",
    "Chain",
    "ClipNorms",
    "ClusterUnits",
    "Consensus",
    "CoordinateMedian",
    "CoreSpace",
    "Decorrelate",
    "Directions",
    "DisjointMax",
    "DisjointMean",
    "Divide",
    "DropOutliers",
    "ElectSign",
    "Entries",
    "ExcludeOutliers",
    "FactorMean",
    "FactorSum",
    "Factors",
    "Fisher",
    "FisherMean",
    "FlagContaminated",
    "Flip",
    "GeometricMedian",
    "In",
    "InCoverSpace",
    "Isotropic",
    "IsotropicCommonSpecific",
    "Keep",
    "Krum",
    "Layers",
    "Magnitude",
    "MagnitudeChance",
    "MatchEnergy",
    "MatchNorm",
    "Mean",
    "ModelStock",
    "NtoM",
    "PerRow",
    "PerSampleTaylor",
    "Prune",
    "Random",
    "RankChance",
    "Reciprocal",
    "RegMean",
    "RobustFactors",
    "RobustSum",
    "RoundOff",
    "SNIP",
    "ScaleByAnchors",
    "ScaleByDepth",
    "Select",
    "SharedBasis",
    "SignedTaylor",
    "Slerp",
    "SmoothSpectrum",
    "Sum",
    "Taylor",
    "Threshold",
    "TopFraction",
    "TopWithTies",
    "TrimmedMean",
    "TuckerSpace",
    "Tune",
    "WeighByAgreement",
    "WeighByAnchors",
    "WeighByEnergy",
    # adapters that stay apart
    "ArrowRouter",
    "FixedRouter",
    "LearnedRouter",
    "Routed",
    "routed",
    # anchors and their losses
    "Anchors",
    "alignment",
    "centered_alignment",
    "contrastive",
    "entropy",
    "from_pairs",
    "language_modeling",
    "outputs_only",
    # errors and warnings
    "AdapterConfigError",
    "AdapterFormatError",
    "AdapterSecurityError",
    "AnchorError",
    "IncompatibleAdaptersError",
    "InputChangedError",
    "LimitExceededError",
    "MethodError",
    "ModelMismatchError",
    "NonFiniteError",
    "OutputError",
    "OutputExistsError",
    "RoundError",
    "SapmergeError",
    "SapmergeWarning",
]
# The methods, each named in its own file.
__all__ += contrib.__all__
__all__ += methods.__all__
