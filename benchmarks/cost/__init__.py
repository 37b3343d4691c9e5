"""The parts of `scoring.py`."""
