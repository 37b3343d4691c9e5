"""sapmerge merges LoRA adapters: `merge(adapters, anchor_loader, model)`, made of composable primitives.

The names below are the public surface; `merging.py` is the place to start reading.
"""

from sapmerge import (
    adapter,
    anchors,
    bases,
    chances,
    compose,
    contrib,
    depth,
    entrywise,
    errors,
    inspection,
    layer,
    masks,
    mergers,
    merging,
    methods,
    outliers,
    prune,
    rankwise,
    rescalers,
    robust,
    scorers,
    spectral,
    subspaces,
    transforms,
    units,
    verification,
)
from sapmerge.adapter import *
from sapmerge.anchors import *
from sapmerge.bases import *
from sapmerge.chances import *
from sapmerge.compose import *
from sapmerge.contrib import *
from sapmerge.depth import *
from sapmerge.entrywise import *
from sapmerge.errors import *
from sapmerge.inspection import *
from sapmerge.layer import *
from sapmerge.masks import *
from sapmerge.mergers import *
from sapmerge.merging import *
from sapmerge.methods import *
from sapmerge.outliers import *
from sapmerge.prune import *
from sapmerge.rankwise import *
from sapmerge.recipe import parse
from sapmerge.rescalers import *
from sapmerge.robust import *
from sapmerge.scorers import *
from sapmerge.spectral import *
from sapmerge.subspaces import *
from sapmerge.transforms import *
from sapmerge.units import *
from sapmerge.verification import *
from sapmerge.version import __version__

RECIPE_NAMES = frozenset(
    name
    for module in (
        anchors,
        bases,
        chances,
        compose,
        contrib,
        depth,
        entrywise,
        masks,
        mergers,
        methods,
        outliers,
        prune,
        rankwise,
        rescalers,
        robust,
        scorers,
        spectral,
        subspaces,
        transforms,
        units,
    )
    for name in module.__all__
    if name
    not in ("Anchors", "Basis", "Coordinates", "Frames", "GradientView", "Mapped", "Units", "from_pairs", "prepare")
)
"""What a recipe may call: every primitive, wrapper and method."""

__all__ = ["__version__", "parse"]
__all__ += adapter.__all__
__all__ += anchors.__all__
__all__ += bases.__all__
__all__ += chances.__all__
__all__ += compose.__all__
__all__ += contrib.__all__
__all__ += depth.__all__
__all__ += entrywise.__all__
__all__ += errors.__all__
__all__ += inspection.__all__
__all__ += layer.__all__
__all__ += masks.__all__
__all__ += mergers.__all__
__all__ += merging.__all__
__all__ += methods.__all__
__all__ += outliers.__all__
__all__ += prune.__all__
__all__ += rankwise.__all__
__all__ += rescalers.__all__
__all__ += robust.__all__
__all__ += scorers.__all__
__all__ += spectral.__all__
__all__ += subspaces.__all__
__all__ += transforms.__all__
__all__ += units.__all__
__all__ += verification.__all__
