"""Asking nodes and taking what comes, with a grid of our own;
and what a client does before it uploads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge import federated as fed
from sapmerge.federated import flower
from sapmerge.federated.exchange import Patience, collect
from sapmerge.federated.inbox import Inbox
from tests.federated.helpers import pair, uploads, zoo

QUICK = Patience(first=2.0, rest=1.2, pull=0.3, pause=0.02)


class Grid:
    """Nodes that answer a request, or do not: node -> function(number of the request)
    -> reply or None.
    """

    def __init__(self, nodes: dict[int, Callable[[int], Any]]) -> None:
        self.nodes, self.sent, self.asked = nodes, dict[str, tuple[int, int]](), dict[int, int]()
        self.pulled: list[int] = []

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Sequence[int]) -> list[str]:
        ids = []
        for node in messages:
            self.asked[node] = self.asked.get(node, 0) + 1
            ids.append(f"{node}.{self.asked[node]}")
            self.sent[ids[-1]] = (node, self.asked[node])
        return ids

    def pull_messages(self, ids: Sequence[str]) -> list[Any]:
        self.pulled.append(len(ids))
        found = []
        for name in list(ids):
            node, number = self.sent[name]
            reply = self.nodes[node](number)
            if reply is not None:
                reply.metadata = SimpleNamespace(reply_to_message_id=name, src_node_id=1)
                found.append(reply)
        return found


def good(seed: int, client: str | None = None, samples: object = 10) -> Callable[[int], Any]:
    return lambda _: SimpleNamespace(has_error=lambda: False, content=(pair(seed), client, samples))


def failed(_: int) -> Any:
    error = SimpleNamespace(reason="ClientApp stopped responding")
    return SimpleNamespace(has_error=lambda: True, error=error, content=None)


def silent(_: int) -> None:
    return None


def run(
    folder: Path, nodes: dict[int, Callable[[int], Any]], patience: Patience = QUICK
) -> tuple[Any, Inbox, Grid]:
    box, grid = Inbox(folder / "round", model=zoo()), Grid(nodes)
    found = collect(
        grid,
        sorted(nodes),
        lambda node: node,
        box,
        lambda content: content,
        patience,
        lambda _: None,
    )
    return found, box, grid


def test_the_table_of_faults(tmp_path: Path) -> None:
    config, state = pair(9)
    nan = {name: tensor * float("nan") for name, tensor in state.items()}
    short = {name: tensor[:, :1] for name, tensor in state.items()}
    nodes = {
        11: good(1, "art"),
        12: good(2),
        13: lambda _: SimpleNamespace(has_error=lambda: False, content=((config, nan), "nan", 5)),
        14: lambda _: SimpleNamespace(
            has_error=lambda: False, content=((config, short), "shape", 5)
        ),
        15: failed,
        16: silent,
        17: lambda _: SimpleNamespace(has_error=lambda: False, content="not even three things"),
        18: good(3, "art"),  # another node's name
        19: good(4, "many", float("inf")),
    }
    found, box, grid = run(tmp_path, nodes)
    assert found.kept == {11: "art", 12: "node-12"}
    assert set(found.failed) == {13, 14, 15, 16, 17, 18, 19}
    assert "did not answer" in found.failed[16]
    assert "stopped responding" in found.failed[15]
    assert "another node's" in found.failed[18]
    assert [*box.clients] == ["art", "node-12"]
    assert max(grid.pulled) <= 8
    assert len(dict(box.merge(method=sm.mean()).updates())) == 3


def test_who_fails_once_is_asked_once_more(tmp_path: Path) -> None:
    """An upload that a locked database lost, a client that died: the second answer counts."""
    again = good(1, "lost")
    nodes = {1: lambda number: failed(1) if number == 1 else again(number), 2: good(2, "fine")}
    found, _, grid = run(tmp_path, nodes)
    assert found.kept == {1: "lost", 2: "fine"}
    assert not found.failed
    assert grid.asked == {1: 2, 2: 1}
    nodes = {1: lambda number: None if number == 1 else again(number), 2: good(2, "fine")}
    (tmp_path / "late").mkdir()
    found, _, _ = run(tmp_path / "late", nodes)
    assert found.kept == {1: "lost", 2: "fine"}


def test_a_link_that_is_out_of_order_for_a_moment_loses_nobody(tmp_path: Path) -> None:
    """Every request of the first half second fails at once, as when the link's database is locked:
    the second request waits.
    """
    began = time.monotonic()

    def shaky(seed: int) -> Callable[[int], Any]:
        return lambda n: (failed if time.monotonic() - began < 0.5 else good(seed))(n)

    patience = Patience(first=4.0, rest=8.0, pull=0.3, pause=0.02, again=1.0)
    found, box, grid = run(tmp_path, {1: shaky(1), 2: shaky(2)}, patience)
    assert len(box.clients) == 2
    assert grid.asked == {1: 2, 2: 2}
    assert not found.failed


def test_a_pull_that_hangs_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    """Pulls of eight go on while the first one hangs; the deadline holds."""

    def hangs(_: int) -> None:
        time.sleep(5)

    nodes: dict[int, Callable[[int], Any]] = {0: hangs}
    nodes |= {k: good(k, f"c{k}") for k in range(1, 13)}
    began = time.monotonic()
    found, _, _ = run(tmp_path, nodes, Patience(first=4.0, rest=4.0, pull=0.2, pause=0.02))
    assert time.monotonic() - began < 5.5
    assert {8, 9, 10, 11, 12} <= set(found.kept)


def test_a_broken_link_is_tried_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def flaky(number: int) -> Any:
        tries.append(number)
        if len(tries) < 4:
            raise ConnectionError("link down")
        return good(1, "art")(number)

    found, _, _ = run(tmp_path, {1: flaky})
    assert found.kept == {1: "art"}


def test_a_restarted_server_goes_on(tmp_path: Path) -> None:
    """Three uploads came before the kill; a second run with the rest merges all."""
    run(tmp_path, {k: good(k, f"c{k}") for k in range(3)})
    found, box, _ = run(tmp_path, {k: good(k, f"c{k}") for k in range(5)})
    assert len(found.kept) == 5
    assert len(box.clients) == 5


def test_a_disk_that_refuses_is_not_a_bad_upload(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise sm.OutputError("no space left")

    monkeypatch.setattr("sapmerge.federated.inbox.stage", full)
    with pytest.raises(sm.OutputError, match="no space"):
        run(tmp_path, {1: good(1)})


def test_without_flower_it_says_what_to_install(monkeypatch) -> None:
    import sys

    for name in ("flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"):
        monkeypatch.setitem(sys.modules, name, None)
    flower._one_shot.cache_clear()
    with pytest.raises(sm.SapmergeError, match=r'pip install "sapmerge\[flower\]"'):
        flower.train_app(lambda *_: ((), 1), "keep")
    with pytest.raises(sm.SapmergeError, match=r'pip install "sapmerge\[flower\]"'):
        flower.OneShot(None)
    with pytest.raises(AttributeError):
        flower.TwoShot


def test_a_client_trains_once_per_round(tmp_path: Path) -> None:
    trained: list[int] = []

    def train() -> tuple[object, int]:
        trained.append(1)
        return pair(3), 17

    for _ in range(3):
        folder, samples = flower._once(str(tmp_path / "keep"), "round-a", train)
    assert samples == 17
    assert len(trained) == 1
    assert sm.Adapter.load(folder).digest == sm.Adapter.from_state_dict(*pair(3)).digest
    flower._once(str(tmp_path / "keep"), "round-b", train)
    assert len(trained) == 2
    with pytest.raises(sm.RoundError):
        flower._once(str(tmp_path / "keep"), "../elsewhere", train)


# Before an upload.


def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_pruning_at_the_client_is_what_the_server_would_do(tmp_path: Path) -> None:
    model, batches = zoo(), [torch.arange(10).reshape(2, 5), torch.arange(5, 15).reshape(2, 5)]
    folders = uploads(tmp_path, 4)
    pruned = []
    for folder in folders:
        made = fed.prune_for_upload(model, folder, batches, density=0.5, loss=loss)
        made.save_pretrained(tmp_path / f"{folder.name}-pruned")
        pruned.append(tmp_path / f"{folder.name}-pruned")
    server = sm.merge(folders, batches, model, method=sm.sap_original(0.5), loss=loss)
    clients = dict(sm.merge(pruned, method=sm.mean()).updates())
    step = sm.sap_original(0.5).steps[0]  # type: ignore[attr-defined]
    whole = sm.prepare(step, server.run.stream)
    same = 0
    for layer in server.run.stream:
        joint = dict(zip(layer.adapters, whole(layer)))
        for folder, path in zip(folders, pruned):
            own, theirs = sm.Adapter.load(path).update(layer.name), joint[folder.name]
            assert torch.equal(own.A, theirs.A)  # type: ignore[union-attr]
            assert torch.equal(own.B, theirs.B)  # type: ignore[union-attr]
            zeros = sum(int((part == 0).sum()) for part in (own.A, own.B))
            assert zeros >= (own.A.numel() + own.B.numel()) // 2 - 1
            same += 2
    assert same == 2 * 3 * 4
    for name, update in server.updates():
        wanted = update.dense()
        assert torch.linalg.norm(clients[name].dense() - wanted) <= 1e-6 * torch.linalg.norm(wanted)


def test_fixed_point_sums_have_one_value_in_any_order() -> None:
    torch.manual_seed(0)
    updates = [sm.Dense(torch.randn(30, 20) * 10.0 ** (k % 5 - 3)) for k in range(50)]
    fixed = [fed.fixed_point(update) for update in updates]
    forward, backward = sum(fixed[1:], fixed[0]), sum(fixed[-2::-1], fixed[-1])
    assert torch.equal(forward, backward)
    exact = sum(update.matrix.double() for update in updates)
    assert (fed.from_fixed_point(forward) - exact).abs().max() <= 50 * 2.0**-25
    floats = [update.matrix for update in updates]
    assert not torch.equal(sum(floats[1:], floats[0]), sum(floats[-2::-1], floats[-1]))
    with pytest.raises(sm.MethodError, match="no room"):
        fed.fixed_point(sm.Dense(torch.full((1, 1), 1e9)))
    with pytest.raises(sm.NonFiniteError):
        fed.fixed_point(sm.Dense(torch.full((1, 1), float("nan"))))
