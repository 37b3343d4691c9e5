"""The parts of `families.py`."""
