"""One-shot federation: clients send one adapter, once; the server keeps what is good and merges it.

`inbox` is the place to start reading. Nothing here needs more than the library's own dependencies.
"""

from sapmerge.federated.contract import Contract, Slot
from sapmerge.federated.inbox import Inbox
from sapmerge.federated.outcome import Kept, Outcome, Refused
from sapmerge.federated.report import ClientReport, RoundReport
from sapmerge.federated.state import MergeState

__all__ = [
    "ClientReport",
    "Contract",
    "Inbox",
    "Kept",
    "MergeState",
    "Outcome",
    "Refused",
    "RoundReport",
    "Slot",
]
