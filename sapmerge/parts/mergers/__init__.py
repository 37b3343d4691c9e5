"""Mergers: Layer -> one update."""
