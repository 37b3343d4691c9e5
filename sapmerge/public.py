"""The public names and where they are, without importing any: `sapmerge.NAME` does that.

A method is not here: it is named once, in the `__all__` of its own file.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["HOMES", "METHODS", "MODULES"]

_NAMES: Mapping[str, str] = {
    # a merge: adapters in, one adapter out
    "sapmerge.comparing": "Comparison MethodResult SearchResult compare search",
    "sapmerge.io.adapter": "Adapter",
    "sapmerge.io.files": "Limits",
    "sapmerge.io.formats.convert": "Converted convert",
    "sapmerge.io.modules": "Module SavedTensor",
    "sapmerge.merging.inspection": "AdapterSummary Inspection LayerSummary inspect",
    "sapmerge.merging.merge": "Merged merge",
    "sapmerge.merging.serving": "check",
    "sapmerge.merging.verification": "reproduce verify",
    "sapmerge.parsing": "parse",
    "sapmerge.version": "__version__",
    # updates, layers, and what each kind of part is
    "sapmerge.core.frames": "Frames",
    "sapmerge.core.layer": "Layer Member",
    "sapmerge.core.part": "on_one_layer prepare",
    "sapmerge.core.protocols": (
        "AnchorPass Basis Coordinates GradientView LayerStream MaskBuilder Merger Method "
        "Observation Rescaler Scorer Stats Transform Units"
    ),
    "sapmerge.core.stream": "Mapped Stream",
    "sapmerge.core.updates": "Dense LowRank Update absent",
    # the primitives
    "sapmerge.parts.bases": "CoreSpace SharedBasis TuckerSpace",
    "sapmerge.parts.chances": "Flip MagnitudeChance RankChance",
    "sapmerge.parts.contaminated": "FlagContaminated",
    "sapmerge.parts.masks": "DropOutliers NtoM PerRow Reciprocal Threshold TopFraction TopWithTies",
    "sapmerge.parts.mergers.cover_space": "InCoverSpace",
    "sapmerge.parts.mergers.entrywise": "CoordinateMedian TrimmedMean",
    "sapmerge.parts.mergers.factors": "ClusterUnits RobustFactors RobustSum",
    "sapmerge.parts.mergers.fisher": "FisherMean",
    "sapmerge.parts.mergers.linear": "DisjointMax DisjointMean FactorMean FactorSum Mean Sum",
    "sapmerge.parts.mergers.regmean": "RegMean",
    "sapmerge.parts.mergers.robust": "GeometricMedian Krum ModelStock Slerp",
    "sapmerge.parts.mergers.spectral": "CART Decorrelate Isotropic IsotropicCommonSpecific",
    "sapmerge.parts.outliers": "CapShare ClipNorms ExcludeOutliers",
    "sapmerge.parts.prune": "Prune",
    "sapmerge.parts.rescalers": "Divide Keep MatchNorm",
    "sapmerge.parts.scaling": "MatchEnergy ScaleByAnchors ScaleByDepth",
    "sapmerge.parts.scorers": (
        "Activation Magnitude PerSampleTaylor Random SNIP SecondOrder SignedTaylor Taylor"
    ),
    "sapmerge.parts.transforms": "Consensus ElectSign RoundOff Select SmoothSpectrum WeighByEnergy",
    "sapmerge.parts.tuning": "Tune",
    "sapmerge.parts.units": "Directions Entries Factors Layers",
    "sapmerge.parts.weighting": "WeighByAgreement WeighByAnchors",
    "sapmerge.parts.wrappers": "ByModule Chain In",
    # adapters that stay apart
    "sapmerge.routing.routed": "Routed routed",
    "sapmerge.routing.routers": "ArrowRouter FixedRouter LearnedRouter",
    # anchors and their losses
    "sapmerge.anchors.anchors": "Anchors",
    "sapmerge.anchors.loading": "from_pairs",
    "sapmerge.losses": (
        "alignment centered_alignment contrastive entropy language_modeling outputs_only"
    ),
    # errors and warnings
    "sapmerge.errors": (
        "AdapterConfigError AdapterFormatError AdapterSecurityError AnchorError "
        "IncompatibleAdaptersError InputChangedError LimitExceededError MethodError "
        "ModelMismatchError NonFiniteError OutputError OutputExistsError RoundError "
        "SapmergeError SapmergeWarning"
    ),
}

HOMES: Mapping[str, str] = {name: home for home, names in _NAMES.items() for name in names.split()}
"""Public name -> its module."""

METHODS = ("sapmerge.contrib", "sapmerge.methods")
"""Packages all of whose names are public."""

MODULES = frozenset(
    {
        "anchors",
        "comparing",
        "contrib",
        "core",
        "display",
        "errors",
        "evaluation",
        "federated",
        "io",
        "losses",
        "merging",
        "methods",
        "models",
        "method_names",
        "naming",
        "parsing",
        "parts",
        "routing",
        "version",
    }
)
"""What `import sapmerge` gives as attributes, too."""
