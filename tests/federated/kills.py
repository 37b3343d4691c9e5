"""Kills processes that add to a round, between every two system calls, and races two of them.
Run as a script.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

import sapmerge as sm
from sapmerge.federated import Inbox
from tests.io.faults import Faults, in_child, kill_self, was_killed


def manifest() -> dict[str, list[int]]:
    return {"q": [6, 5]}


def upload(seed: int) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    a, b = torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator)
    return config, {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}


def digest(seed: int) -> str:
    return sm.Adapter.from_state_dict(*upload(seed)).digest


def whole(folder: Path, promised: dict[str, int], possible: dict[str, set[int]]) -> dict[str, str]:
    """What a round holds after a kill: everything promised, nothing torn, nothing left over;
    and it can be merged.
    """
    box = Inbox(folder)
    kept = (
        {entry.label: entry.digest for entry in box.merge(method=sm.mean()).adapters}
        if box.clients
        else {}
    )
    for client, seed in promised.items():
        assert client in kept, f"{client} was lost"
        assert kept[client] in {digest(s) for s in possible.get(client, {seed})}, (
            f"{client} is torn"
        )
    stray = set(kept) - set(promised) - set(possible)
    assert not stray, stray
    assert all(
        kept[client] in {digest(s) for s in possible[client]}
        for client in set(kept) - set(promised)
    )
    folders = sorted(path.name for path in (folder / "kept").iterdir())
    assert len(folders) == len(set(kept.values())), folders
    hidden = [p.name for p in folder.rglob(".*") if p.name != ".lock"]
    assert not hidden, hidden
    return kept


def kills_in_add(folder: Path) -> Counter[str]:
    """Three situations: a new client, a client's second upload, a client who leaves;
    the state is kept, too.
    """
    seen: Counter[str] = Counter()
    for task in ("new", "again", "remove"):
        for number in range(1, 1000):
            if folder.exists():
                shutil.rmtree(folder)
            box = Inbox(folder, manifest=manifest())
            assert box.add(upload(1), "one")
            assert box.add(upload(2), "two")
            box.state()

            def act(task: str = task, number: int = number) -> None:
                with Faults(number, kill_self):
                    mine = Inbox(folder)
                    if task == "new":
                        mine.add(upload(3), "three")
                    elif task == "again":
                        mine.add(upload(3), "two")
                    else:
                        mine.remove("two")

            killed = was_killed(in_child(act))
            if task == "new":
                kept = whole(folder, {"one": 1, "two": 2}, {"three": {3}})
                done = "three" in kept
            elif task == "again":
                kept = whole(folder, {"one": 1, "two": 2}, {"two": {2, 3}})
                done = kept["two"] == digest(3)
            else:
                kept = whole(folder, {"one": 1}, {"two": {2}})
                done = "two" not in kept
            box = Inbox(folder)
            fresh, running = dict(box.merge(method=sm.mean()).updates()), box.state().mean()
            assert torch.allclose(fresh["q"].dense(), running["q"].dense(), atol=1e-5), (
                task,
                number,
            )
            seen[f"{task}: {'done' if done else 'not done'}"] += 1
            if not killed:
                assert done, (task, number)
                break
        else:
            raise AssertionError("never finished")
    return seen


def race(folder: Path, count: int) -> Counter[str]:
    """Two processes add at once: clients of their own, one that both claim,
    and one content that both send.
    """
    Inbox(folder, manifest=manifest())

    def act(which: int) -> None:
        mine = Inbox(folder)
        for k in range(count):
            assert mine.add(upload(10 * k + which), f"own{which}.{k}", 10)
            assert mine.add(upload(1000 + k), f"same{which}.{k}", 10)
            assert mine.add(upload(2000 + 10 * k + which), f"both.{k}", 10)

    children = [in_child(lambda which=which: act(which)) for which in (1, 2)]
    killed = [was_killed(child) for child in children]
    assert killed == [False, False]
    box = Inbox(folder)
    clients = box.clients
    assert len(clients) == 5 * count, sorted(clients)
    contents = {entry.digest for entry in box.merge(method=sm.mean()).adapters}
    assert {digest(10 * k + which) for k in range(count) for which in (1, 2)} <= contents
    assert len(contents) == 4 * count
    assert len(list((folder / "kept").iterdir())) == 4 * count
    history = [
        json.loads((folder / "clients" / f"both.{k}.json").read_text())["history"]
        for k in range(count)
    ]
    assert all(len(entries) == 2 for entries in history)
    return Counter(clients=len(clients))


def main() -> None:
    task, folder, amount = sys.argv[1:]
    torch.set_num_threads(1)
    path = Path(folder) / "round"
    print(json.dumps(kills_in_add(path) if task == "kills" else race(path, int(amount))))


if __name__ == "__main__":
    main()
