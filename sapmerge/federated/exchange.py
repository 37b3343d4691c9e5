"""Asking every node once, and taking what comes: requests, replies in small chunks, a deadline.
Needs no package.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sapmerge.errors import OutputError, RoundError
from sapmerge.federated.inbox import Inbox
from sapmerge.federated.outcome import Refused

__all__ = ["Collected", "Patience", "collect"]

_CHUNK = 8
"""Replies pulled at a time: so many are at risk in a kill,
because the link deletes what it has handed out.
"""


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds.

    Args:
        first: for the first reply.
        rest: for the others, from the first one on.
        pull: for one pull; it goes on in the background, and what it brings is still taken.
        pause: between two pulls.
        again: before one that failed is asked once more: a link that was out of order for a moment
            says of all its nodes that they are not there. At most a quarter of `rest`.
    """

    first: float = 600.0
    rest: float = 180.0
    pull: float = 30.0
    pause: float = 1.0
    again: float = 30.0


@dataclass
class Collected:
    """What came of the nodes.

    Args:
        kept: node -> client.
        failed: node -> why nothing of it is kept.
    """

    kept: dict[int, str] = field(default_factory=dict[int, str])
    failed: dict[int, str] = field(default_factory=dict[int, str])


def collect(
    grid: Any,
    nodes: Sequence[int],
    request: Callable[[int], Any],
    inbox: Inbox,
    upload_of: Callable[[Any], tuple[object, str | None, int]],
    patience: Patience,
    say: Callable[[str], None],
) -> Collected:
    """Ask every node, and put replies into the inbox as they come;
    nodes that fail or do not answer are asked once more.

    Args:
        grid: has `push_messages(messages) -> ids` and `pull_messages(ids) -> replies`.
        request: node -> message.
        upload_of: content of a reply -> (upload, client or None, samples).
        say: is told what happens.
    """
    found, waiting, asked = Collected(), dict[str, int](), dict[int, int]()
    arrived: queue.Queue[Any] = queue.Queue()
    pulls: list[tuple[threading.Thread, float, list[str]]] = []

    def ask(some: Sequence[int]) -> None:
        for start in range(0, len(some), _CHUNK):
            chunk = some[start : start + _CHUNK]
            ids = list(grid.push_messages([request(node) for node in chunk]))
            for node, message in zip(chunk, ids):
                asked[node] = asked.get(node, 0) + 1
                if message:
                    waiting[message] = node

    ask(list(nodes))
    began, first = time.monotonic(), 0.0
    claims: dict[str, int] = {}
    failed_at: dict[int, float] = {}
    again_after = min(patience.again, patience.rest / 4)
    while True:
        while True:
            try:
                reply = arrived.get_nowait()
            except queue.Empty:
                break
            node = waiting.pop(str(reply.metadata.reply_to_message_id), None)
            if node is None or node in found.kept:
                continue
            first = first or time.monotonic()
            _take(reply, node, found, claims, inbox, upload_of, say)
            failed_at.setdefault(node, time.monotonic())
        now = time.monotonic()
        missing = [node for node in nodes if node not in found.kept]
        over = now - first > patience.rest if first else now - began > patience.first
        if not missing or over:
            break
        due = [node for node in missing if asked[node] == 1 and node in found.failed]
        again = [node for node in due if now - failed_at[node] >= again_after]
        if first and now - first > patience.rest / 2:
            again = [node for node in missing if asked[node] == 1]
        if again:
            say(f"asking once more: {again}")
            ask(again)
        elif not due and not any(node in missing for node in waiting.values()):
            break  # all have answered, and were asked twice
        pulls = [p for p in pulls if p[0].is_alive()]
        held = {
            message for _, since, ids in pulls if now - since < patience.pull for message in ids
        }
        free = [
            message for message, node in waiting.items() if node in missing and message not in held
        ][:_CHUNK]
        if free and len(pulls) < _CHUNK:
            thread = threading.Thread(target=_pull, args=(grid, free, arrived, say), daemon=True)
            thread.start()
            pulls.append((thread, now, free))
            thread.join(min(patience.pause, patience.pull))
        time.sleep(min(patience.pause, 0.05) if not arrived.empty() else patience.pause)
    for node in nodes:
        if node not in found.kept and node not in found.failed:
            found.failed[node] = "did not answer in time"
            say(f"node {node}: did not answer in time")
    return found


def _pull(
    grid: Any, ids: Sequence[str], arrived: queue.Queue[Any], say: Callable[[str], None]
) -> None:
    try:
        for reply in grid.pull_messages(list(ids)):
            arrived.put(reply)
    except Exception as error:
        say(f"a pull failed, and is tried again: {type(error).__name__}: {error}")


def _take(
    reply: Any,
    node: int,
    found: Collected,
    claims: dict[str, int],
    inbox: Inbox,
    upload_of: Callable[[Any], tuple[object, str | None, int]],
    say: Callable[[str], None],
) -> None:
    who = f"node-{node}"
    if reply.has_error():
        reason = str(getattr(reply.error, "reason", "") or "failed")
        outcome: Any = inbox.refuse(who, f"the client failed: {reason}")
    else:
        try:
            upload, claimed, samples = upload_of(reply.content)
            who = claimed or who
            if claims.setdefault(who, node) != node:
                outcome = inbox.refuse(f"node-{node}", f"the name {who!r} is another node's")
            else:
                outcome = inbox.add(upload, who, samples)
        except (OutputError, RoundError):
            raise
        except Exception as error:
            outcome = inbox.refuse(
                who, f"the reply cannot be read: {type(error).__name__}: {error}"
            )
    if isinstance(outcome, Refused):
        found.failed[node] = outcome.reason
        claims.pop(who, None) if claims.get(who) == node else None
        say(f"node {node}: refused, {outcome.reason}")
    else:
        found.kept[node] = who
        found.failed.pop(node, None)
        say(f"node {node}: kept {who}")
