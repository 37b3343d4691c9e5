"""A method in the coordinates that all updates share."""

from __future__ import annotations

from sapmerge.core.protocols import Method
from sapmerge.methods.pruning import ties
from sapmerge.parts.bases import CoreSpace, SharedBasis
from sapmerge.parts.wrappers import In

__all__ = ["core_space", "knots"]


def knots(density: float = 0.2, scaled: bool = True) -> Method:
    """KnOTS-TIES: TIES in the shared basis of all updates, with one threshold per adapter.

    `In(SharedBasis(scaled=False), method)` runs any other method on the V_k, as the core-space code
    does with TSV and CART.

    Args:
        density: the fraction of coordinates kept (20 % for the ViT models of the paper, 100 % for
            its language models).
        scaled: see `SharedBasis`; True is the authors' code, which made the published numbers.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.knots())

    Source: Stoica et al., https://arxiv.org/abs/2410.19735.
    The authors scale the result (0.6 for ViT-B/32): `scale=`.
    """
    return In(SharedBasis(scaled), ties(density, scope="adapter"))


def core_space(inner: Method | None = None, balance: bool = True) -> Method:
    """Any method in the core space of the factors; exact and cheap for linear and spectral rules.

    The paper's rules are `core_space(ties())`, `core_space(tsv())` (Core-TSV),
    `core_space(iso_c())` (Core-Iso), `core_space(cart())`, and, isotropized,
    `core_space(Isotropic(ties()))`. Sums, means, `iso_c` and `iso_cts` are the same in the core and
    outside. `tsv` and `cart` are not told the size of the layer there:
    they take shares of the side of the core, the sum of the ranks,
    where they take shares of min(m, n) outside.

    Args:
        inner: the method, `ties()` by default.
        balance: see `CoreSpace`; the published numbers need False.
            Spectral rules do not depend on it.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.core_space())

    Source: Panariello et al., https://arxiv.org/abs/2509.17786
    """
    return In(CoreSpace(balance), ties() if inner is None else inner)
