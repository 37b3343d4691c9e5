"""Methods compared on a metric of one's own.

compare.py   every method of a list
search.py    parameters of methods, by Optuna (extra `search`)
bench.py     one method merged, applied, evaluated; the model as it was after each
metric.py    what a metric returns, read as a number with an interval where it tells
table.py     the leaderboard: what is better, and what cannot be told apart
kept.py      results of an earlier run, kept in a folder
plot.py      the leaderboard as a picture (extra `plot`)
"""

from sapmerge.comparing.compare import compare
from sapmerge.comparing.search import SearchResult, search
from sapmerge.comparing.table import Comparison, MethodResult

__all__ = ["Comparison", "MethodResult", "SearchResult", "compare", "search"]
