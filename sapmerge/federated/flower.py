"""One-shot federation over Flower (extra `flower`):
`OneShot`, a strategy, and `train_app`, a client.

This module imports without Flower; using it says what to install. Success is the round's report,
never the exit code of `flwr run`, which is 0 also where the server was killed.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.core.protocols import Method
from sapmerge.errors import MethodError, RoundError
from sapmerge.federated.exchange import Collected, Patience, collect
from sapmerge.federated.extras import package
from sapmerge.federated.inbox import Inbox
from sapmerge.io.atomic import StagedFolder
from sapmerge.io.records import Records, is_folder, read_record
from sapmerge.io.uploads import files_of, stage, tensors_of
from sapmerge.merging.merge import Merged

__all__ = ["Patience", "train_app"]

_ROUND_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST = 1 << 34  # bytes of an own upload


def __getattr__(name: str) -> Any:
    """`OneShot` derives from a class of Flower, so it is made when it is first asked for."""
    if name == "OneShot":
        return _one_shot()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Round:
    """The part of `OneShot` that needs nothing of Flower."""

    def __init__(
        self,
        inbox: Inbox,
        anchors: Any = None,
        model: Any = None,
        *,
        method: Method | None = None,
        output: str | os.PathLike[str] | None = None,
        nodes: int | None = None,
        patience: Patience | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """See `OneShot`."""
        self.inbox, self.anchors, self.model, self.method = inbox, anchors, model, method
        self.output = os.fspath(output or os.path.join(inbox.path, "merged"))
        self.nodes, self.patience, self.say = (
            nodes or inbox.contract.quorum,
            patience or Patience(),
            say,
        )
        self.merged: Merged | None = None
        self.collected = Collected()

    def gather(self, grid: Any, request: Callable[[int], Any]) -> Merged:
        """Ask, collect, merge, save.

        Raises:
            RoundError: fewer clients than the quorum.
        """
        nodes = self._wait_for_nodes(grid)
        self.collected = collect(
            grid, nodes, request, self.inbox, _upload_of, self.patience, self.say
        )
        self.merged = self.inbox.merge(self.anchors, self.model, method=self.method, progress=False)
        self.merged.save_pretrained(self.output, overwrite=True)
        self.say(str(self.inbox.report))
        return self.merged

    def _wait_for_nodes(self, grid: Any) -> list[int]:
        began = time.monotonic()
        while len(nodes := sorted(grid.get_node_ids())) < self.nodes:
            if time.monotonic() - began > self.patience.first:
                break  # late uploads of an earlier run may be in the inbox: the quorum decides
            time.sleep(min(1.0, self.patience.pause))
        self.say(f"{len(nodes)} nodes are there, {self.nodes} were wanted")
        return nodes


@cache
def _one_shot() -> type:
    app: Any = package("flwr.app", "flower")
    base: Any = package("flwr.serverapp.strategy", "flower").Strategy
    result: Any = package("flwr.serverapp.strategy", "flower").Result

    class OneShot(_Round, base):
        """A strategy of one round: every node is asked once, what is good goes into the inbox,
        and is merged.

        Replies are kept as they come, so that a server that is killed loses none of them; run it
        again, and clients made by `train_app` answer from disk.
        A client that raises, dies or does not answer is asked once more.

        Args:
            inbox: of the round; its quorum and contract hold.
            anchors, model, method: as for `Inbox.merge`.
            output: folder of the merged adapter; `merged` in the round by default.
            nodes: to wait for; the quorum by default.
            patience: how long to wait for what.
            say: is told what happens.
        """

        def start(self, grid: Any, initial_arrays: Any = None, **_: Any) -> Any:
            """Run the round. Other arguments of Flower's strategies (num_rounds, ...) have
            no meaning here.

            Returns:
                Flower's `Result`, whose arrays are those of the merged adapter's file.
            """
            self.gather(grid, lambda node: self._request(node, initial_arrays))
            made = result()
            made.arrays = app.ArrayRecord(tensors_of(self.output))
            return made

        def _request(self, node: int, arrays: Any) -> Any:
            contract = self.inbox.contract
            told: dict[str, Any] = {"round": self.inbox.id, "max-rank": contract.max_rank}
            told |= {"base-model": contract.base_model} if contract.base_model else {}
            content = {"config": app.ConfigRecord(told)} | (
                {} if arrays is None else {"arrays": arrays}
            )
            return app.Message(
                content=app.RecordDict(content), message_type="train", dst_node_id=node
            )

        def configure_train(
            self, server_round: int, arrays: Any, config: Any, grid: Any
        ) -> list[Any]:
            """The requests to all nodes."""
            return [self._request(node, arrays) for node in sorted(grid.get_node_ids())]

        def aggregate_train(self, server_round: int, replies: Any) -> tuple[Any, Any]:
            """Keep the replies, and merge; for those who drive the strategy themselves."""
            for reply in replies:
                node = int(reply.metadata.src_node_id)
                if reply.has_error():
                    self.inbox.refuse(f"node-{node}", "the client failed")
                    continue
                upload, client, samples = _upload_of(reply.content)
                self.inbox.add(upload, client or f"node-{node}", samples)
            merged = self.inbox.merge(self.anchors, self.model, method=self.method, progress=False)
            merged.save_pretrained(self.output, overwrite=True)
            return app.ArrayRecord(tensors_of(self.output)), app.MetricRecord(
                {"clients": len(self.inbox.clients)}
            )

        def configure_evaluate(
            self, server_round: int, arrays: Any, config: Any, grid: Any
        ) -> list[Any]:
            """Nobody evaluates: the round is over."""
            return []

        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            """Nothing to aggregate."""
            return None

        def summary(self) -> None:
            """Say what the round is."""
            self.say(f"one-shot round {self.inbox.id} in {self.inbox.path}")

    return OneShot


def _upload_of(content: Any) -> tuple[object, str | None, int]:
    """The upload in a reply: arrays, the config as text, who sends it, and its samples."""
    told = content["adapter"]
    state = cast("dict[str, Tensor]", content["arrays"].to_torch_state_dict())
    client, count = told.get("client"), content["metrics"]["num-examples"]
    samples: Any = int(count) if isinstance(count, float) and count.is_integer() else count
    return (str(told["config"]), state), None if client is None else str(client), samples


def train_app(
    train: Callable[[Any, Mapping[str, Any]], tuple[object, int]],
    keep: str,
    client: str | None = None,
) -> Any:
    """A `ClientApp` that trains once per round, and answers a second request of the
    round from disk.

    Args:
        train: (context, config of the server) -> (upload, samples); the upload is a folder of an
            adapter, or (config, state_dict).
        keep: folder of the client's own, where its uploads stay.
        client: its name in the round; `client` of the node's config, or the node's
            number, by default.

    Raises:
        SapmergeError: Flower is not installed.
    """
    app: Any = package("flwr.app", "flower")
    made: Any = package("flwr.clientapp", "flower").ClientApp()

    def answer(message: Any, context: Any) -> Any:
        config = dict(message.content["config"])
        name = client or context.node_config.get("client")
        upload, samples = _once(keep, str(config.get("round")), lambda: train(context, config))
        return app.Message(
            content=app.RecordDict(_records(app, upload, samples, name)), reply_to=message
        )

    made.train()(answer)
    return made


def _once(keep: str, round_id: str, train: Callable[[], tuple[object, int]]) -> tuple[str, int]:
    """The folder with this round's upload, which is made if there is none yet, and its samples."""
    if not _ROUND_ID.fullmatch(round_id):
        raise RoundError(f"the server's round id {round_id!r} cannot be the name of a folder")
    Records(keep)
    folder = os.path.join(keep, round_id)
    note = read_record(os.path.join(folder, "upload.json")) if is_folder(folder) else None
    if note is None:
        made, samples = train()
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MethodError(
                f"train gives (upload, samples), samples a whole number from 1 on; got {samples!r}"
            )
        config, weights = files_of(made, _MOST)
        with StagedFolder(folder, overwrite=True) as staged:
            stage(staged, config, weights)
            staged.write("upload.json", json.dumps({"samples": samples}).encode())
            staged.publish()
        note = {"samples": samples}
    return folder, int(note["samples"])


def _records(app: Any, folder: str, samples: int, client: object) -> dict[str, Any]:
    config, _ = files_of(folder, _MOST)
    state = {
        name: tensor.float()
        if tensor.dtype == torch.bfloat16
        else tensor  # arrays of Flower know no bfloat16
        for name, tensor in tensors_of(folder).items()
    }
    told = {"config": config.decode()} | ({} if client is None else {"client": str(client)})
    return {
        "arrays": app.ArrayRecord(state),
        "adapter": app.ConfigRecord(told),
        "metrics": app.MetricRecord({"num-examples": samples}),
    }
