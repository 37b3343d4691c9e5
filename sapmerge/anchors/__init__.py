"""Anchors: a tiny public set of pairs, and what a model's loss on them says about each adapter.

This package is the only place with autograd. `losses.py` has the losses, `loading.py` makes and checks batches,
`gradients.py` is a gradient seen through products, `hooks.py` puts adapters into a model and takes them out again, and
`passes.py` runs the anchors for a method's pre-pass,
`weighing.py` weighs whole adapters by their loss.
"""

from sapmerge.anchors.loading import from_pairs
from sapmerge.anchors.losses import alignment, centered_alignment, contrastive, language_modeling
from sapmerge.anchors.passes import Anchors
from sapmerge.anchors.weighing import WeighByAnchors

__all__ = [
    "Anchors",
    "WeighByAnchors",
    "alignment",
    "centered_alignment",
    "contrastive",
    "from_pairs",
    "language_modeling",
]
