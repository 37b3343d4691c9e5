"""Losses on anchors: (model, batch) -> scalar. Any callable of this form is one.

The image-text losses take their embeddings from `model.get_image_features` and
`model.get_text_features`, or from the batch if it holds `image_embeds` or `text_embeds` already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sapmerge.core.linalg import wide
from sapmerge.core.protocols import AnchorPass
from sapmerge.errors import AnchorError

__all__ = [
    "alignment",
    "centered_alignment",
    "contrastive",
    "entropy",
    "language_modeling",
    "outputs_only",
]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Batch: TypeAlias = Mapping[str, Any]
L = TypeVar("L", bound=Callable[..., Tensor])

_MARK = "_sapmerge_outputs_only"

WEIGHT = "anchor_weight"
"""Key of a batch's weights (samples,): a sample of weight w counts w times. They have mean 1 over
all batches of the anchors, and every loss below is the mean of w times the loss of a sample."""

INPUTS = {
    "image": ("pixel_values", "interpolate_pos_encoding", "pixel_attention_mask", "spatial_shapes"),
    "text": ("input_ids", "attention_mask", "position_ids", "token_type_ids"),
}
"""What each tower takes from a batch."""


def outputs_only(loss: L) -> L:
    """Say of a loss that it looks at what the model returns,
    and at nothing that modules leave behind while they run.

    Then what runs before the first adapted layer need not run again for every adapter.
    sapmerge's own losses are so.

    Example:
        >>> from sapmerge import anchors
        >>> @anchors.outputs_only
        ... def loss(model, batch):
        ...     return model(**batch).logits.square().mean()
    """
    setattr(loss, _MARK, True)
    return loss


def is_outputs_only(loss: Loss) -> bool:
    """Whether that was said."""
    return getattr(loss, _MARK, False) is True


@outputs_only
def alignment(model: nn.Module, batch: Batch) -> Tensor:
    """1 - cos(V, T), averaged over the pairs: the loss of SAP.
    Needs no negatives, and is small when all collapse.

    Example:
        >>> import sapmerge as sm
        >>> loss = sm.alignment(model, next(iter(loader)))  # a scalar
    """
    image, text = embeddings(model, batch)
    return _apart(image, text, _weights_of(batch))


@outputs_only
def centered_alignment(model: nn.Module, batch: Batch) -> Tensor:
    """1 - cos(V - mean V, T - mean T): what all images (all texts) of a batch share
    cannot lower it.

    Example:
        >>> import sapmerge as sm
        >>> loss = sm.centered_alignment(model, next(iter(loader)))  # a scalar
    """
    weights = _weights_of(batch)
    image, text = (
        functional.normalize(side - _centre(side, weights), dim=-1)
        for side in embeddings(model, batch)
    )
    return _apart(image, text, weights)


@outputs_only
def contrastive(model: nn.Module, batch: Batch) -> Tensor:
    """Symmetric InfoNCE at the model's temperature (1 / 0.07 if it has none);
    other pairs are negatives.

    Example:
        >>> import sapmerge as sm
        >>> loss = sm.contrastive(model, next(iter(loader)))  # a scalar
    """
    image, text = embeddings(model, batch)
    if len(image) < 2:
        raise AnchorError(
            "contrastive takes its negatives from the batch, and this one has a single pair"
        )
    learned = getattr(model, "logit_scale", None)
    scale = learned.exp() if isinstance(learned, Tensor) else 1 / 0.07
    logits = (image @ text.T) * scale
    target = torch.arange(len(logits), device=logits.device)
    if (weights := _weights_of(batch)) is not None:
        both = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
        return -(weights * both).mean() / 2
    return (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    ) / 2


@outputs_only
def entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean entropy of the predictions; needs no labels (AdaMerging).

    Of a two-tower model: of each image among the texts of the batch, at the model's temperature. Of
    others: of the softmax over the last dimension of `model(**batch).logits`,
    where `attention_mask` is not 0.

    Example:
        >>> import sapmerge as sm
        >>> loss = sm.entropy(model, next(iter(loader)))  # a scalar
    """
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        image, text = embeddings(model, batch)
        learned = getattr(model, "logit_scale", None)
        scale = learned.exp() if isinstance(learned, Tensor) else 1 / 0.07
        entropies, weights = _entropy((image @ text.T) * scale), _weights_of(batch)
        return entropies.mean() if weights is None else (weights * entropies).mean()
    if not isinstance(batch, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AnchorError(f"entropy needs dict batches; got a {type(batch).__name__}")
    logits = getattr(model(**_inputs(batch)), "logits", None)
    if not isinstance(logits, Tensor):
        raise AnchorError(f"{type(model).__name__} gives no logits for this batch; pass loss=...")
    entropies, mask = _entropy(wide(logits)), batch.get("attention_mask")
    if (weights := _weights_of(batch)) is not None:
        entropies = entropies * weights.reshape(-1, *[1] * (entropies.ndim - 1))
    if isinstance(mask, Tensor) and mask.shape == entropies.shape:
        return (entropies * mask).sum() / mask.sum()
    return entropies.mean()


def _entropy(logits: Tensor) -> Tensor:
    logs = torch.log_softmax(logits, -1)
    return -(logs.exp() * logs).sum(-1)


@outputs_only
def language_modeling(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss. Without `labels`, these are the input tokens except padding
    and image tokens.

    Example:
        >>> import torch, sapmerge as sm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> loss = sm.language_modeling(llama, {"input_ids": torch.tensor([[1, 2, 3]])})
    """
    if not isinstance(batch, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AnchorError(
            "the model's own loss needs dict batches, for model(**batch); got a "
            f"{type(batch).__name__}"
        )
    if "labels" not in batch and "input_ids" in batch:
        labels = cast("Tensor", batch["input_ids"]).clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = -100
        image_token = getattr(getattr(model, "config", None), "image_token_id", None)
        if isinstance(image_token, int):
            labels[labels == image_token] = -100
        batch = {**batch, "labels": labels}
    # keys and values for tokens that nobody generates
    if "use_cache" not in batch and _keeps_cache(model):
        batch = {**batch, "use_cache": False}
    out = model(**_inputs(batch))
    loss = getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        raise AnchorError(
            f"{type(model).__name__} returns no loss for a batch with {sorted(batch)}; pass "
            "loss=..."
        )
    weights = _weights_of(batch)
    return loss if weights is None else _weighted_tokens(out, loss, batch["labels"], weights)


def _weighted_tokens(out: Any, loss: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over tokens of the weight of their sample times their cross-entropy."""
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor) and logits.shape[:2] == labels.shape:
        target = labels[:, 1:]
        each = functional.cross_entropy(
            wide(logits[:, :-1]).transpose(1, 2), target, ignore_index=-100, reduction="none"
        )
        count = (target != -100).sum()
        if torch.allclose((each.sum() / count).detach(), wide(loss.detach()), rtol=1e-2):
            return (weights[:, None] * each).sum() / count
    raise AnchorError(
        f"{WEIGHT!r} needs a loss that is the mean cross-entropy of the next token, and this "
        "model's is not; leave the weights out, or pass loss=..."
    )


def _weights_of(batch: Batch) -> Tensor | None:
    """The weights of a batch's samples, if it has any."""
    return cast("Tensor | None", batch.get(WEIGHT))


def _inputs(batch: Batch) -> Batch:
    """A batch without what is for the loss alone."""
    return {key: value for key, value in batch.items() if key != WEIGHT}


def _centre(points: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return points.mean(0)
    return (weights[:, None] * points).sum(0) / weights.sum().clamp_min(1e-12)


def _apart(image: Tensor, text: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of 1 - cos of unit vectors."""
    cosines = (image * text).sum(-1)
    return 1 - cosines.mean() if weights is None else (weights * (1 - cosines)).mean()


def _keeps_cache(model: nn.Module) -> bool:
    """Whether a forward pass keeps keys and values unless it is told not to."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    taken = inspect.signature(model.forward).parameters
    named = "use_cache" in taken or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()
    )
    return getattr(text, "use_cache", None) is True and named


def embeddings(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Unit image and text embeddings (pairs, d), in float32 or wider."""
    return embedding(model, batch, "image"), embedding(model, batch, "text")


def embedding(model: nn.Module, batch: Batch, side: str) -> Tensor:
    """The unit embeddings of one side of a batch: (pairs, d), in float32 or wider.

    Args:
        model: a two-tower model.
        batch: of image-text pairs.
        side: "image" or "text".
    """
    return functional.normalize(wide(_pooled(model, batch, side)), dim=-1)


def once_embedded(model: nn.Module, batch: Batch) -> Batch:
    """A batch of image-text pairs with what the towers make of it:
    several losses of pairs take one pass, and have the values that they have alone.
    """
    return {**batch, **{f"{side}_embeds": _pooled(model, batch, side) for side in INPUTS}}


def _pooled(model: nn.Module, batch: Batch, side: str) -> Tensor:
    """The embeddings of one side of a batch, as its tower gives them."""
    if not isinstance(batch, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AnchorError(
            "the image-text losses need dict batches, with pixel_values and input_ids; got a "
            f"{type(batch).__name__}"
        )
    if f"{side}_embeds" in batch:
        return cast("Tensor", batch[f"{side}_embeds"])
    features = getattr(model, f"get_{side}_features", None)
    inputs = {key: batch[key] for key in INPUTS[side] if key in batch}
    if features is None or not inputs:
        raise AnchorError(
            f"the image-text losses need {side}s: a model with get_{side}_features and its inputs "
            "in the batch, or "
            f"'{side}_embeds'; the batch of this {type(model).__name__} has {sorted(batch)}"
        )
    vectors = features(**inputs)
    pooled = vectors if isinstance(vectors, Tensor) else getattr(vectors, "pooler_output", None)
    if not isinstance(pooled, Tensor):
        raise AnchorError(
            f"get_{side}_features of {type(model).__name__} gives no pooled embedding; pass "
            "loss=..."
        )
    return pooled


PAIR_LOSSES = (alignment, centered_alignment, contrastive)
"""Those of image-text pairs."""

NAMED: Mapping[str, Loss] = {
    loss.__name__: loss
    for loss in (alignment, centered_alignment, contrastive, entropy, language_modeling)
}
"""What a recipe may name."""


def default_loss(model: nn.Module) -> Loss:
    """`alignment` for a model with both towers, its own loss for a transformers model that has one.

    Raises:
        AnchorError: any other model.
    """
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        return alignment
    if hasattr(model, "config") and any(
        hasattr(model, name) for name in ("lm_head", "embed_out", "get_image_features")
    ):
        return language_modeling
    raise AnchorError(
        f"{type(model).__name__} is neither a two-tower image-text model nor a language model; "
        "say which loss its anchors have: loss=lambda model, batch: ..."
    )


def loss_for(model: nn.Module, loss: Loss | None) -> Loss:
    """The loss that is given, or else the default of the model.

    Raises:
        AnchorError: it is no function of (model, batch), or the model has no default.
    """
    if loss is None:
        return default_loss(model)
    given = cast("object", loss)
    if not callable(given) or isinstance(given, type):
        hint = f"; pass the function, loss=sm.{given}" if given in list(NAMED) else ""
        raise AnchorError(f"a loss is a function (model, batch) -> scalar; got {given!r:.80}{hint}")
    try:
        own = inspect.signature(loss)
    except ValueError:  # it has none that can be read
        return loss
    try:
        own.bind(model, {})
    except TypeError:
        raise AnchorError(
            f"the loss {loss_name(loss)!r} is called with (model, batch); it takes {own}"
        ) from None
    return loss


def comparing(anchors: AnchorPass) -> Loss | None:
    """The loss that tells adapters apart by default: one that compares pairs;
    None, the anchors' own, for others.
    """
    return centered_alignment if anchors.pairs else None


def loss_name(loss: Loss) -> str:
    """What a report calls a loss."""
    return str(getattr(loss, "__name__", None) or type(loss).__name__)
