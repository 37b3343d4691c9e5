"""The parts of `domain_generalization.py`."""
