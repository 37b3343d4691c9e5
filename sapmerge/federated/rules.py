"""How federated learning aggregates LoRA. Rules with one result are methods;
those with more are functions.

`fedit`, `ffa`, `flora`, `hetlora`, `yoco` and `fedrpca` go into `merge(..., method=...)` or
`Inbox.merge`, whose weights are the clients' samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sapmerge.contrib.fedlora import fedrpca, ffa, hetlora, yoco
from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import concatenate
from sapmerge.core.protocols import Method
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import MethodError
from sapmerge.federated.personal import Personal
from sapmerge.merging.heads import HeadPolicy
from sapmerge.merging.inputs import Adapters, load_adapters
from sapmerge.merging.merge import Merged, merge
from sapmerge.methods.averaging import factor_average, mean
from sapmerge.parts.mergers.linear import FactorMean, Mean

__all__ = ["FedEx", "fedex", "fedit", "fedrpca", "ffa", "flex", "flora", "hetlora", "yoco"]

Samples = Sequence[float] | Mapping[str, float] | None
"""One number per client in the order of the adapters, or label -> number; None: all the same."""


def fedit() -> Method:
    """FedAvg on the factors, (sum p B)(sum p A): `factor_average` under the name that
    federated papers use.
    """
    return factor_average()


def flora() -> Method:
    """FLoRA: the factors stacked, which is `mean`: exact, of rank at most the sum of the ranks."""
    return mean()


@dataclass(frozen=True)
class FedEx:
    """FedEx-LoRA's two adapters: what FedIT would send, and what it would miss.
    Together they are the mean, exactly.

    Args:
        adapter: (sum p B)(sum p A), of the clients' rank.
        residual: sum p B A - (sum p B)(sum p A), of rank at most (K + 1) r: add it to the base
            weights (`residual.apply_to(model)`) or load it beside the adapter.
    """

    adapter: Merged
    residual: Merged


def fedex(adapters: Adapters, samples: Samples = None, modules_to_save: HeadPolicy = None) -> FedEx:
    """FedEx-LoRA: the FedIT adapter, and its residual to the mean as a second adapter;
    exact together.

    Args:
        adapters: as for `merge`; of one rank.
        samples: per client.
        modules_to_save: as for `merge`; heads go with the first adapter.

    Raises:
        MethodError: unequal ranks.

    Source: Singhal et al., "FedEx-LoRA: exact aggregation for federated and efficient fine-tuning
    of foundation models", https://arxiv.org/abs/2410.09432. The official code adds the residual
    transposed to `nn.Linear` weights; an update here is (outputs, inputs) for every kind of layer.
    """
    opened = load_adapters(adapters)
    residual = merge(
        opened, method=_residual, weights=samples, modules_to_save=_left_out(opened), rank="exact"
    )
    return FedEx(
        merge(opened, method=_factor_mean, weights=samples, modules_to_save=modules_to_save),
        residual,
    )


def flex(
    adapters: Adapters,
    ranks: Mapping[str, int] | None = None,
    samples: Samples = None,
    modules_to_save: HeadPolicy = None,
) -> Personal:
    """FlexLoRA: the mean of the updates, and of it for every client the best approximation of the
    client's own rank.

    Args:
        adapters: as for `merge`.
        ranks: label -> rank; by default the largest of each client's adapter.
        samples: per client.
        modules_to_save: as for `merge`.

    Returns:
        Label -> a merge whose rank is the client's; `save_pretrained` writes all from one pass
        over the layers.

    Raises:
        MethodError: `ranks` names others than the clients, or no rank.

    Source: Bai et al., "Federated fine-tuning of large language models under heterogeneous tasks
    and client resources", https://arxiv.org/abs/2402.11505.
    The official code writes alpha = 16 whatever the clients had.
    """
    opened = load_adapters(adapters)
    labels = [adapter.label for adapter in opened]
    if ranks is None:
        ranks = {a.label: max((m.rank for m in a.modules.values()), default=1) for a in opened}
    if set(ranks) != set(labels):
        raise MethodError(f"ranks name {sorted(ranks)}, the clients are {sorted(labels)}")
    policy = modules_to_save
    shared = Personal.sharing(opened)
    rows = {
        label: merge(
            shared, method=mean(), weights=samples, rank=ranks[label], modules_to_save=policy
        )
        for label in labels
    }
    return Personal(rows)


def _left_out(opened: Sequence[object]) -> HeadPolicy:
    return "drop" if any(getattr(adapter, "saved", None) for adapter in opened) else None


def _factor_mean(layer: Layer) -> Update:
    """FedIT without its warning: the residual has what it misses."""
    return FactorMean()(layer)


def _residual(layer: Layer) -> Update:
    """sum p B A - (sum p B)(sum p A), as factors."""
    exact, apart = Mean()(layer), FactorMean()(layer)
    if not isinstance(exact, LowRank) or not isinstance(apart, LowRank):
        raise MethodError(
            f"layer {layer.name!r}: an update is dense and has no factors to average; use mean()"
        )
    return concatenate([exact, apart], [1.0, -1.0])
