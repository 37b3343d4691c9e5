"""PEFT's `add_weighted_adapter`, with the algebra done on the updates B A instead of on A and B.

from sapmerge.compat import add_weighted_adapter
add_weighted_adapter(peft_model, ["a", "b"], [1.0, 0.5], "merged",
combination_type="ties", density=0.2)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from sapmerge.core.protocols import Method
from sapmerge.errors import MethodError, ModelMismatchError, OutputExistsError, SapmergeWarning
from sapmerge.io.adapter import Adapter
from sapmerge.merging.heads import HeadPolicy
from sapmerge.merging.merge import merge
from sapmerge.methods import dare, dare_ties, magnitude_prune, task_arithmetic, ties
from sapmerge.parts.masks import check_density

__all__ = ["COMBINATION_TYPES", "add_weighted_adapter"]

_Sign = Literal["total", "frequency"]
_Rule = Callable[[float, _Sign], Method]

_RULES: dict[str, _Rule] = {
    "ties": lambda density, sign: ties(density, sign),
    "dare_linear": lambda density, sign: dare(density),
    "dare_ties": lambda density, sign: dare_ties(density, majority_sign_method=sign),
    "magnitude_prune": lambda density, sign: magnitude_prune(density),
}
_SUMS = ("linear", "cat", "svd")

COMBINATION_TYPES = (*_SUMS, *(name + suffix for name in _RULES for suffix in ("", "_svd")))
"""Every `combination_type` of PEFT 0.21.2."""


def add_weighted_adapter(
    peft_model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    modules_to_save: HeadPolicy = None,
) -> None:
    """Add an adapter to a live PeftModel, merged from some of its own:
    signature and names of PEFT's method.

    ==============================  ================================  ======================
    combination_type                here                              rank
    ==============================  ================================  ======================
    svd                             sum w D                           svd_rank, or the largest
    cat, linear                     sum w D, exactly                  the sum of the ranks
    magnitude_prune (_svd)          `magnitude_prune(density)`        the largest (svd_rank)
    ties (_svd)                     `ties(density, ...)`              the largest (svd_rank)
    dare_linear (_svd)              `dare(density)`                   the largest (svd_rank)
    dare_ties (_svd)                `dare_ties(density, 0, ...)`      the largest (svd_rank)
    ==============================  ================================  ======================

    D = s B A with every scaling in it; "the largest" is the largest rank of a module of the
    adapters, and more than min(outputs, inputs) of a module is never used. "..." is
    `majority_sign_method`. `cat` and `svd` agree with PEFT. What is different, and why:

    ==============================  ================================  ======================
    PEFT 0.21.2                     its result                        here
    ==============================  ================================  ======================
    types without `_svd`            merge A and B apart: cross terms  the rule on D
                                    B_i A_j
    those with ranks that differ    refused                           merged
    ties, dare_ties                 elect without the weights,        elect on w D, divide by
                                    divide by the number of adapters  the sum of their |w|
                                    that agree
    use_rslora                      inherited: the result is          scaling is 1
                                    sqrt(rank) too large
    dare_*                          masks from torch's global         the same in every run
                                    generator
    one adapter                     always `linear`                   the rule that was asked
    `adapter_name` exists           returns, and adds nothing         OutputExistsError
    too few or too many weights     the rest is dropped               MethodError
    svd_rank above min(m, n)        RuntimeError                      lossless
    svd of Conv1d and Conv3d        RuntimeError                      as for other modules
    svd_clamp                       clamps both factors at a          MethodError: it depends
                                    quantile of their entries         on how D is factored
    svd_full_matrices, svd_driver   how torch computes the SVD        no effect: the SVD is one
                                                                      of small matrices
    ==============================  ================================  ======================

    Args:
        peft_model: the model; its adapters and their configs stay as they are.
        adapters: names of its adapters.
        weights: one number per adapter; negative ones subtract.
        adapter_name: of the new adapter.
        combination_type: see above.
        svd_rank: for `svd` and `*_svd`.
        svd_clamp: refused.
        svd_full_matrices: no effect.
        svd_driver: no effect.
        density: the fraction of entries of D kept, for all types but svd, cat and linear.
        majority_sign_method: "total" or "frequency", for the types with ties.
        modules_to_save: as in `merge`, for adapters with heads; PEFT has no such argument.

    Raises:
        MethodError: an unknown type, another number of weights than adapters, no density, a
            `svd_clamp`.
        OutputExistsError: the name is taken.

    Warns:
        SapmergeWarning: an argument is given that the type does not read (PEFT is silent), or the
        rank keeps less
            than 90 % of the energy.
    """
    rule = combination_type.removesuffix("_svd")
    if combination_type not in COMBINATION_TYPES:
        raise MethodError(
            f"combination_type is one of {', '.join(COMBINATION_TYPES)}; got {combination_type!r}"
        )
    if svd_clamp is not None:
        raise MethodError(
            "svd_clamp is not supported: it clamps the entries of two factors, and what that does "
            "to the update "
            "depends on how it is factored; leave it out, or limit the update by weights"
        )
    if not hasattr(peft_model, "peft_config"):
        raise ModelMismatchError(
            f"add_weighted_adapter takes a PeftModel; got {type(peft_model).__name__}"
        )
    if adapter_name in peft_model.peft_config:
        raise OutputExistsError(
            f"the model already has an adapter {adapter_name!r}; choose another name"
        )
    names = _checked_names(adapters)
    method = _method(rule, density, majority_sign_method)
    unread = {
        "svd_rank": svd_rank is not None and not combination_type.endswith("svd"),
        "svd_driver": svd_driver is not None,
        "density": density is not None and rule in _SUMS,
        "majority_sign_method": majority_sign_method != "total" and not rule.endswith("ties"),
    }
    for argument in (argument for argument, given in unread.items() if given):
        warnings.warn(
            f"{argument} has no effect on {combination_type!r}", SapmergeWarning, stacklevel=2
        )
    opened = [Adapter.from_peft_model(peft_model, name) for name in names]
    rank: int | None = None
    if combination_type.endswith("svd"):
        largest = max(
            (module.rank for adapter in opened for module in adapter.modules.values()), default=1
        )
        rank = largest if svd_rank is None else svd_rank
    merge(
        opened,
        model=peft_model,
        method=method,
        weights=list(weights),
        rank=rank,
        modules_to_save=modules_to_save,
    ).add_to(peft_model, adapter_name)


def _checked_names(adapters: object) -> list[str]:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise MethodError(f"adapters is a list of names of adapters of the model; got {adapters!r}")
    return [str(name) for name in adapters]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _method(rule: str, density: float | None, majority_sign_method: _Sign) -> Method:
    if rule in _SUMS:
        return task_arithmetic()
    if density is None:
        raise MethodError(
            f"combination_type={rule!r} needs density, the fraction of entries kept, e.g. "
            "density=0.5"
        )
    check_density(density)
    return _RULES[rule](density, majority_sign_method)
