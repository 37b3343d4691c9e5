"""Anchors: a tiny public set of pairs, and what a model's loss on them says about each adapter.

This package is the only place with autograd.

    losses.py     (model, batch) -> scalar
    loading.py    batches: made from pairs, and checked to be the same on every pass
    hooks.py      adapters put into a model and taken out again, and what passes through its layers
    gradients.py  the gradient of a layer, seen through products
    observing.py  statistics of gradients over the anchors, within a budget of memory
    activations.py  inputs of the layers: their sizes and Gram matrices
    resuming.py, identity.py   what is kept on disk for a later run, under a key of everything it depends on
    halving.py    two halves of the anchors
    towers.py     embeddings of a tower that no adapter touches
    prefix.py     outputs of what runs before the first adapted layer, kept for the next adapter
    calls.py      one call of a module, and whether another one is the same
    passes.py     the anchors of one merge: forward and backward passes
    weighing.py   whole adapters, weighed by their loss
    scaling.py    the length of the merged update
    fishers.py, regression.py, tuning.py   the parts of `fisher`, `regmean` and `tune`
"""

from sapmerge.anchors.fishers import FisherMean
from sapmerge.anchors.loading import from_pairs
from sapmerge.anchors.losses import (
    alignment,
    centered_alignment,
    contrastive,
    entropy,
    language_modeling,
    outputs_only,
)
from sapmerge.anchors.passes import Anchors
from sapmerge.anchors.regression import RegMean
from sapmerge.anchors.scaling import ScaleByAnchors
from sapmerge.anchors.tuning import Tune
from sapmerge.anchors.weighing import WeighByAnchors

__all__ = [
    "Anchors",
    "FisherMean",
    "RegMean",
    "ScaleByAnchors",
    "Tune",
    "WeighByAnchors",
    "alignment",
    "centered_alignment",
    "contrastive",
    "entropy",
    "from_pairs",
    "language_modeling",
    "outputs_only",
]
