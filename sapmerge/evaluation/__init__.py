"""Accuracies with intervals: what a test of so many images can tell. Needs numpy only.

A test of 175 images cannot tell 71 % from 73 %: the interval of either is 13 points wide. Every
function gives 95 % intervals unless `level` says otherwise, as shares between 0 and 1 where it
counts, in the unit of its input elsewhere.
"""

from sapmerge.evaluation.corrected import (
    Corrected,
    CorrectedShares,
    corrected_share,
    corrected_shares,
)
from sapmerge.evaluation.intervals import Interval, over_seeds, paired, wilson
from sapmerge.evaluation.macc import macc

__all__ = [
    "Corrected",
    "CorrectedShares",
    "Interval",
    "corrected_share",
    "corrected_shares",
    "macc",
    "over_seeds",
    "paired",
    "wilson",
]
