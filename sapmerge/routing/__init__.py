"""Adapters that stay apart, and a router that mixes them per token: when one merge is not
enough.
"""
