"""Anchors: a tiny public set of pairs, and what a model's loss on them says about each adapter.

This package is the only place with autograd.

    loading.py     batches: made from pairs, halved, and checked to be the same on every pass
    folders.py     batches from a folder of images with captions; saving.py writes one
    freezing.py    the base model while anchors run through it: frozen, and put back
    hooks.py       adapters put into a model and taken out again, and what passes through its layers
    gradients.py   the gradient of a layer, seen through products
    runner.py      forward and backward passes over the anchors, at base + adapter
    statistics.py  statistics of gradients over the anchors, within a budget of memory
    inputs.py      inputs of the layers: their sizes and Gram matrices
    anchors.py     what a part may ask: gradients, losses, Gram matrices
    cache.py, digest.py   what is kept on disk for a later run, under a key of everything it depends
    on
    choose.py      anchors chosen from a larger pool; transport.py has the plans
    mmd.py         how different two sets of anchors are
    towers.py      embeddings of a tower that no adapter touches
    prefix.py, calls.py   outputs of what runs before the first adapted layer,
    kept for the next adapter
"""

from sapmerge.anchors.anchors import Anchors
from sapmerge.anchors.choose import Chosen, at_random, coreset, features, kmeans
from sapmerge.anchors.folders import Pair, from_csv, from_folder, read_folder
from sapmerge.anchors.hub import read_dataset
from sapmerge.anchors.loading import from_pairs
from sapmerge.anchors.mmd import MMD, mmd
from sapmerge.anchors.saving import write_folder
from sapmerge.losses import (
    alignment,
    centered_alignment,
    contrastive,
    entropy,
    language_modeling,
    outputs_only,
)

__all__ = [
    "MMD",
    "Anchors",
    "Chosen",
    "Pair",
    "alignment",
    "at_random",
    "centered_alignment",
    "contrastive",
    "coreset",
    "entropy",
    "features",
    "from_csv",
    "from_folder",
    "from_pairs",
    "kmeans",
    "language_modeling",
    "mmd",
    "outputs_only",
    "read_dataset",
    "read_folder",
    "write_folder",
]
