"""A method in the coordinates that all updates share."""

from __future__ import annotations

from sapmerge.bases import CoreSpace, SharedBasis
from sapmerge.compose import In
from sapmerge.layer import Method
from sapmerge.methods.pruning import ties

__all__ = ["core_space", "knots"]


def knots(density: float = 0.2, scaled: bool = True) -> Method:
    """KnOTS-TIES: TIES in the shared basis of all updates, with one threshold per adapter.

    Args:
        density: the fraction of coordinates kept (20 % for the ViT models of the paper, 100 % for its language models).
        scaled: see `SharedBasis`; True is the authors' code, which made the published numbers.

    Source: Stoica et al., https://arxiv.org/abs/2410.19735. The authors scale the result (0.6 for ViT-B/32): `scale=`.
    """
    return In(SharedBasis(scaled), ties(density, scope="adapter"))


def core_space(inner: Method | None = None, balance: bool = True) -> Method:
    """Any method in the core space of the factors; exact and cheap for linear and spectral rules.

    Args:
        inner: the method, `ties()` by default.
        balance: see `CoreSpace`; the published numbers need False.

    Source: Panariello et al., https://arxiv.org/abs/2509.17786
    """
    return In(CoreSpace(balance), ties() if inner is None else inner)
