"""An app of Flower for `tests/federated/superlink.py`: what its clients do wrong, by scenario."""

SCENARIOS = {
    "values": ("good", "good", "nan", "shape"),
    "processes": ("good", "raises", "dies", "silent"),
    "killed": ("good", "good", "good", "slow"),
    "locked": ("good", "good", "good", "good"),
}
"""Scenario -> what the client of each of four nodes does."""

MODULES = ("a", "b", "c")
