"""What keeps a trained router from sending every token to one expert, and its logits small."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balance_loss", "z_loss"]


def balance_loss(weights: Tensor) -> Tensor:
    """K^2 mean_k(mean_t p_tk * share of tokens whose largest weight is k's), over tokens t and
    experts k.

    1 for a uniform router, K where all tokens go to one expert with all their weight. Only p has a
    gradient.

    Args:
        weights: (..., tokens, K), rows sum to 1; the mean over the sequences, if there are several.

    Returns:
        A scalar.

    Source: Fedus et al., "Switch Transformers" (JMLR 2022), https://arxiv.org/abs/2101.03961
    """
    count = weights.shape[-1]
    first = torch.nn.functional.one_hot(weights.argmax(-1), count).to(weights.dtype)
    return count * (weights.mean(-2) * first.mean(-2)).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """The mean of logsumexp(logits)^2 over tokens.

    Args:
        logits: (..., K).

    Returns:
        A scalar.

    Source: Zoph et al., "ST-MoE" (2022), https://arxiv.org/abs/2202.08906
    """
    return torch.logsumexp(logits, -1).square().mean()
