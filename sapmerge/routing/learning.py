"""Training a linear router on the anchors: the one place outside of `anchors` that asks for
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sapmerge.anchors.freezing import frozen
from sapmerge.anchors.loading import Batches, batch_size
from sapmerge.errors import AnchorError, NonFiniteError
from sapmerge.losses import Loss, loss_for, loss_name
from sapmerge.models import Site, device_of
from sapmerge.routing.live import Stack, hooked
from sapmerge.routing.losses import balance_loss, z_loss
from sapmerge.routing.routers import LearnedRouter

__all__ = ["learn"]


def learn(
    router: LearnedRouter,
    model: Any,
    loader: Any,
    sites: Mapping[str, Site],
    stacks: Mapping[str, Stack],
    start: Mapping[str, Tensor],
    loss: Loss | None,
) -> dict[str, Tensor]:
    """Layer -> trained matrix W (K, n), float32.

    Args:
        model: the base model; it comes back as it was.
        loader: of the anchors.
        sites: where the layers are in it.
        stacks: layer -> the adapters' updates.
        start: layer -> W to begin with.
        loss: (model, batch) -> scalar; None: by what the model is.

    Raises:
        AnchorError: the loss depends on no layer that the adapters change.
        NonFiniteError: the loss is NaN or infinite.
    """
    batches = Batches(loader, device_of(model))
    matrices = {
        name: start[name].to(site.weight.device, torch.float32, copy=True).requires_grad_()
        for name, site in sites.items()
    }
    seen = dict[str, list[Tensor]]()

    def weigh(name: str, x: Tensor) -> Tensor:
        logits = x @ matrices[name].T
        seen.setdefault(name, []).append(logits)
        return torch.softmax(logits, -1)

    optimizer = torch.optim.Adam(matrices.values(), lr=router.lr)
    with frozen(model) as base, hooked(sites, stacks, weigh), torch.enable_grad():
        chosen: Loss = loss_for(base, loss)
        total = sum(batch_size(batch) for batch in batches)
        for _ in range(router.steps):
            optimizer.zero_grad()
            for batch in batches:
                seen.clear()
                value = chosen(base, batch).reshape(())
                if not (seen and value.requires_grad):
                    raise AnchorError(
                        f"the loss {loss_name(chosen)!r} depends on no layer that the adapters "
                        "change"
                    )
                if not bool(torch.isfinite(value)):
                    raise NonFiniteError(
                        f"the anchor loss {loss_name(chosen)!r} is {float(value)} while the "
                        "router is trained; a smaller lr may help"
                    )
                logits = [torch.cat(calls) for calls in seen.values()]
                even = sum(balance_loss(torch.softmax(one, -1)) for one in logits) / len(logits)
                small = sum(z_loss(one) for one in logits) / len(logits)
                whole = value + router.balance * even + router.z * small
                (whole * (batch_size(batch) / total)).backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    return {name: matrix.detach().cpu() for name, matrix in matrices.items()}
