"""The pieces of benchmarks/merging.py: shapes, files, peers,
and the processes that are measured.
"""
