"""One-shot federation: clients send one adapter, once; the server keeps what is good and merges it.

`inbox` is the place to start reading. Nothing here needs more than the library's own dependencies.
"""

from sapmerge.federated.client import fixed_point, from_fixed_point, prune_for_upload
from sapmerge.federated.contract import Contract, Slot
from sapmerge.federated.inbox import Inbox
from sapmerge.federated.nearest import neighbours
from sapmerge.federated.outcome import Kept, Outcome, Refused
from sapmerge.federated.personal import Personal, by_task, personalize, pilot
from sapmerge.federated.pilot_client import (
    Mixed,
    MixtureOfAdapters,
    TwoAdapters,
    balance_loss,
    difference_loss,
    z_loss,
)
from sapmerge.federated.prompts import Prompts, average_prompts
from sapmerge.federated.refinement import refine
from sapmerge.federated.report import ClientReport, RoundReport
from sapmerge.federated.rules import FedEx, fedex, fedit, fedrpca, ffa, flex, flora, hetlora, yoco
from sapmerge.federated.shards import Stage, plan, score
from sapmerge.federated.sketch import Sketch
from sapmerge.federated.state import MergeState

__all__ = [
    "ClientReport",
    "Contract",
    "FedEx",
    "Inbox",
    "Kept",
    "MergeState",
    "Mixed",
    "MixtureOfAdapters",
    "Outcome",
    "Personal",
    "Prompts",
    "Refused",
    "RoundReport",
    "Sketch",
    "Slot",
    "Stage",
    "TwoAdapters",
    "average_prompts",
    "balance_loss",
    "by_task",
    "difference_loss",
    "fedex",
    "fedit",
    "fedrpca",
    "ffa",
    "fixed_point",
    "flex",
    "flora",
    "from_fixed_point",
    "hetlora",
    "neighbours",
    "personalize",
    "pilot",
    "plan",
    "prune_for_upload",
    "refine",
    "score",
    "yoco",
    "z_loss",
]
