"""Alignment of adapters whose bases do not correspond, by Gromov-Wasserstein transport.

Extra `gromov`. Neurons of two models are matched by how far they are from the other neurons of
their own model, which no rotation of the inputs changes. Import it by name:
`from sapmerge.contrib import gromov`.
"""

from sapmerge.contrib.gromov.bases import GromovAlign, Space, Wiring, transformer
from sapmerge.contrib.gromov.method import GromovMerge, dgsm_tefm
from sapmerge.contrib.gromov.plans import Plan, gromov_plan, neuron_distances
from sapmerge.contrib.gromov.signatures import signature, tfi, tos

__all__ = [
    "GromovAlign",
    "GromovMerge",
    "Plan",
    "Space",
    "Wiring",
    "dgsm_tefm",
    "gromov_plan",
    "neuron_distances",
    "signature",
    "tfi",
    "tos",
    "transformer",
]
