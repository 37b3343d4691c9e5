"""Kinds of adapters: what a file stores, turned into the update of one weight matrix.
One file per kind.

Each kind is a `Reading`: it names the tensors it is made of, and makes an update of them. What is
added to a base that cannot be written as a matrix (biases, rows of an embedding) is in `vectors`.
"""
