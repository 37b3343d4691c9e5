"""Layers side by side, and the shortcuts of the algebra beneath:
the same results as one after the other, in full.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import sapmerge as sm
from sapmerge.core import linalg
from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import gram, inner
from sapmerge.core.updates import Update
from sapmerge.merging.merge import merge
from sapmerge.merging.stream import in_order
from tests.conftest import error, low_rank


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order_from_one_thread_of_torch(workers: int) -> None:
    torch.set_num_threads(3)
    threads: set[int] = set()

    def slow_first(item: int) -> int:
        time.sleep(0.01 / (1 + item))
        threads.add(torch.get_num_threads())
        return item * item

    assert list(in_order(slow_first, range(12), workers)) == [item * item for item in range(12)]
    assert threads == ({3} if workers == 1 else {1})
    assert torch.get_num_threads() == 3
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [3], "threads made later have as many as before"
    torch.set_num_threads(1)


def test_only_a_few_are_in_flight() -> None:
    started: list[int] = []
    results = in_order(lambda item: started.append(item) or item, range(100), 2)
    assert next(results) == 0
    assert max(started) <= 2
    results.close()  # type: ignore[attr-defined]
    assert max(started) <= 2


def test_an_error_comes_at_its_turn() -> None:
    def fails_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(fails_at_three, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_many_threads_write_the_same_bytes_and_notes() -> None:
    def adapter(seed: int) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(9):
            where = f"base_model.model.layers.{layer}.fc"
            tensors[f"{where}.lora_A.weight"] = torch.randn(3, 20 + layer, generator=generator)
            tensors[f"{where}.lora_B.weight"] = torch.randn(30 - layer, 3, generator=generator)
        return {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["fc"]}, tensors

    def stored(threads: int) -> tuple[list[str], list[torch.Tensor], list[object]]:
        torch.set_num_threads(threads)
        rows = list(merge([adapter(0), adapter(1)], method=sm.ties(0.3), rank=3).run.stored())
        torch.set_num_threads(1)
        return (
            [module.name for module, _, _ in rows],
            [update.dense() for _, update, _ in rows],
            [row.notes for _, _, row in rows],
        )

    one, four = stored(1), stored(4)
    assert one[0] == four[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], four[1], strict=True))
    assert one[2] == four[2]
    assert all(row["density"] for row in one[2])  # type: ignore[index]


def test_what_users_call_works_on_as_many_layers_as_torch_has_threads(tmp_path: Path) -> None:
    """Everything is computed on one thread of torch each, which is not how many the caller has."""
    adapter = {
        f"base_model.model.layers.{layer}.fc.lora_{factor}.weight": torch.eye(4)
        for layer in range(4)
        for factor in "AB"
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["fc"]}
    two_at_once = threading.Barrier(2)

    def method(layer: Layer) -> Update:
        two_at_once.wait(timeout=60)  # for another layer
        return layer.updates[0]

    torch.set_num_threads(2)
    try:
        merge([(config, adapter)], method=method).save_pretrained(tmp_path / "out")
    finally:
        torch.set_num_threads(1)
    assert two_at_once.n_waiting == 0


# The algebra.


def test_the_norm_of_a_matrix_of_several_blocks() -> None:
    matrix = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    wide = matrix.double()
    assert linalg.norm(matrix) == pytest.approx(float(wide.square().sum().sqrt()), rel=1e-13)
    assert linalg.norm(matrix, p=1) == pytest.approx(float(wide.abs().sum()), rel=1e-13)
    assert linalg.norm(matrix[:0]) == 0.0


def test_finite_is_not_fooled_by_an_overflowing_sum() -> None:
    largest = torch.finfo(torch.float32).max
    assert linalg.finite(torch.tensor([largest, largest]))
    assert linalg.finite(torch.zeros(0))
    for bad in ([float("inf"), -float("inf")], [1.0, float("nan")], [float("inf"), 1.0]):
        assert not linalg.finite(torch.tensor(bad))


@pytest.mark.parametrize(
    ("m", "n", "r"), [(40, 30, 7), (7, 30, 7), (30, 7, 12), (1, 1, 1), (5, 6, 40)]
)
def test_the_first_singular_vectors_are_those_of_the_full_decomposition(
    m: int, n: int, r: int
) -> None:
    update = low_rank((m, n), r, 0)
    U, sigma, Vh = update.svd()
    few = update.svd(2)
    assert few[0].shape == (m, min(2, m, n))
    torch.testing.assert_close(few[1], sigma)
    torch.testing.assert_close((few[0] * few[1][:2]) @ few[2], (U[:, :2] * sigma[:2]) @ Vh[:2])
    assert error((U * sigma) @ Vh, update.dense()) < 1e-13


def test_inner_products_of_more_ranks_than_a_block() -> None:
    updates = [low_rank((60, 50), 70, seed) for seed in range(9)]  # 630 columns
    products = gram(updates)
    for i, x in enumerate(updates):
        for j, y in enumerate(updates):
            wanted = float((x.dense() * y.dense()).sum())
            assert float(products[i, j]) == pytest.approx(wanted, rel=1e-10, abs=1e-8)
            assert inner(x, y) == pytest.approx(wanted, rel=1e-10, abs=1e-8)
