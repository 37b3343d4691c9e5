"""`sapmerge round new | add | list | remove | merge | report ROUND`: a round from the shell."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sapmerge.cli.arguments import rank_of
from sapmerge.cli.choices import DTYPES
from sapmerge.cli.hub import add_hub_option, local
from sapmerge.cli.recipes import method_of
from sapmerge.errors import MethodError, ModelMismatchError, RoundError, printable

if TYPE_CHECKING:
    from torch import nn

    from sapmerge.federated.inbox import Inbox

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns the parsers of its actions."""
    parser = commands.add_parser(
        "round",
        help="a one-shot federated round",
        description="A one-shot federated round.",
        epilog="example: sapmerge round new round-1 --model base --quorum 20",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    new = actions.add_parser(
        "new",
        help="make a round",
        description="Make a round: what its uploads must be.",
        epilog="example: sapmerge round new round-1 --model base --quorum 20",
    )
    new.add_argument("round", metavar="ROUND", help="folder to make")
    source = new.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", help="the base model, a folder or a name: only its configuration is read"
    )
    source.add_argument(
        "--manifest", help="JSON file module -> [outputs, inputs], or the folder of an adapter"
    )
    new.add_argument("--base-model", help="name of the base model; that of --model by default")
    new.add_argument(
        "--modules", help="those that may be adapted: q_proj,v_proj or patterns; all by default"
    )
    new.add_argument(
        "--max-rank", type=int, default=64, help="of any module (default: %(default)s)"
    )
    new.add_argument("--max-bytes", type=int, help="of an upload; by default what the rank needs")
    new.add_argument(
        "--max-share", type=float, default=0.5, help="of the samples, for one client (%(default)s)"
    )
    new.add_argument(
        "--quorum", type=int, default=1, help="clients that a merge needs (default: %(default)s)"
    )
    new.add_argument("--json", action="store_true", help="data instead of a line")
    new.set_defaults(run=_new)

    add = actions.add_parser(
        "add",
        help="check an upload and keep it",
        description="Check an upload and keep it.",
        epilog="example: sapmerge round add round-1 upload.zip --client hospital-7 --samples 1200",
    )
    add.add_argument("round", metavar="ROUND")
    add.add_argument(
        "upload",
        metavar="UPLOAD",
        help="folder of an adapter, hf://user/name, or a zip file of its two files",
    )
    add.add_argument("--client", required=True, help="who sends it")
    add.add_argument(
        "--samples", type=int, default=1, help="training samples behind it (default: %(default)s)"
    )
    add_hub_option(add)
    add.add_argument("--json", action="store_true", help="data instead of a line")
    add.set_defaults(run=_add)

    look = actions.add_parser(
        "list",
        help="who is there",
        description="Who is there, and with how many samples.",
        epilog="example: sapmerge round list round-1 --expected hospital-7 hospital-8",
    )
    look.add_argument("round", metavar="ROUND")
    look.add_argument(
        "--expected", nargs="+", default=[], metavar="CLIENT", help="say who of these is missing"
    )
    look.add_argument("--json", action="store_true", help="data instead of lines")
    look.set_defaults(run=_list)

    remove = actions.add_parser(
        "remove",
        help="take a client out",
        description="Remove a client and its upload.",
        epilog="example: sapmerge round remove round-1 hospital-7",
    )
    remove.add_argument("round", metavar="ROUND")
    remove.add_argument("client", metavar="CLIENT")
    remove.add_argument("--json", action="store_true", help="data instead of a line")
    remove.set_defaults(run=_remove)

    merge = actions.add_parser(
        "merge",
        help="merge what is kept",
        description="Merge what is kept, by samples.",
        epilog="example: sapmerge round merge round-1 -o merged",
    )
    merge.add_argument("round", metavar="ROUND")
    merge.add_argument("-o", "--output", required=True, help="folder to write")
    merge.add_argument(
        "--method", default="mean", help="as in `sapmerge merge` (default: %(default)s)"
    )
    merge.add_argument("--density", type=float, help="fraction kept, in (0, 1]")
    merge.add_argument(
        "--rank", type=rank_of, help="cap on the rank, share of energy in (0, 1), or 'exact'"
    )
    merge.add_argument("--modules-to-save", help="heads: mean or drop")
    merge.add_argument(
        "--save-dtype", choices=DTYPES, help="of the output; by default that of the uploads"
    )
    merge.add_argument("--overwrite", action="store_true", help="replace an existing output")
    merge.add_argument("--json", action="store_true", help="the report as data")
    merge.set_defaults(run=_merge)

    report = actions.add_parser(
        "report",
        help="every client and every refusal",
        description="Describe a round.",
        epilog="example: sapmerge round report round-1 --json",
    )
    report.add_argument("round", metavar="ROUND")
    report.add_argument("--json", action="store_true", help="data instead of a page")
    report.set_defaults(run=_report)
    return [new, add, look, remove, merge, report]


def _is_round(folder: str) -> bool:
    from sapmerge.io.records import is_folder, read_record

    return is_folder(folder) and read_record(os.path.join(folder, "round.json")) is not None


def _opened(options: argparse.Namespace) -> Inbox:
    from sapmerge.federated.inbox import Inbox
    from sapmerge.io.files import shown

    if not _is_round(options.round):
        raise RoundError(f"{shown(options.round)} is no round; `sapmerge round new` makes one")
    return Inbox(options.round)


def _new(options: argparse.Namespace) -> None:
    from sapmerge.federated.inbox import Inbox

    there = _is_round(options.round)
    inbox = Inbox(
        options.round,
        base_model=options.base_model or options.model,
        model=None if options.model is None else _skeleton(options.model),
        manifest=options.manifest,
        modules=None if options.modules is None else options.modules.split(","),
        max_rank=options.max_rank,
        max_bytes=options.max_bytes,
        quorum=options.quorum,
        max_share=options.max_share,
    )
    contract = inbox.contract
    if options.json:
        data = {
            "round": inbox.path,
            "base_model": contract.base_model,
            "modules": len(contract.modules),
            "max_rank": contract.max_rank,
            "max_bytes": contract.max_bytes,
            "max_share": contract.max_share,
            "quorum": contract.quorum,
        }
        print(json.dumps(data, indent=2))
        return
    print(
        f"{inbox.path}: {len(contract.modules)} modules, rank at most {contract.max_rank}, quorum "
        f"{contract.quorum}"
        + (f"; it is there already, with {len(inbox.clients)} uploads" if there else "")
    )


def _skeleton(name: str) -> nn.Module:
    """A transformers model without weights: names and shapes are in its configuration."""
    import torch
    import transformers

    from sapmerge.io.files import shown

    library: Any = transformers
    try:
        config = library.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelMismatchError(
            f"--model {shown(name)}: no configuration can be read ({error})"
        ) from None
    architecture: str = (config.architectures or ["AutoModel"])[0]
    kind: Any = getattr(library, architecture, None)
    if kind is None:
        raise ModelMismatchError(
            f"--model {shown(name)}: transformers has no {architecture}; use --manifest"
        )
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _add(options: argparse.Namespace) -> None:
    from sapmerge.federated.outcome import Kept
    from sapmerge.io.records import is_folder

    upload: Any = local(options.upload, options)
    if upload.endswith(".zip") and not is_folder(upload):
        from sapmerge.io.uploads import zipped

        upload = zipped(upload)
    outcome = _opened(options).add(upload, options.client, options.samples)
    if options.json:
        print(json.dumps({"kept": bool(outcome), **asdict(outcome)}, indent=2))
        raise SystemExit(0 if outcome else 2)
    if not isinstance(outcome, Kept):
        raise MethodError(f"refused: {outcome.reason}")
    print(f"kept {options.client}")


def _list(options: argparse.Namespace) -> None:
    inbox = _opened(options)
    missing = inbox.missing(options.expected)
    if options.json:
        print(json.dumps({"clients": dict(inbox.clients), "missing": list(missing)}, indent=2))
        return
    for client, samples in inbox.clients.items():
        print(f"{client}\t{samples}")
    for client in missing:
        print(f"{client}\tmissing")


def _remove(options: argparse.Namespace) -> None:
    inbox = _opened(options)
    inbox.remove(options.client)
    if options.json:
        print(json.dumps({"removed": options.client, "clients": dict(inbox.clients)}, indent=2))
    else:
        print(f"removed {options.client}")


def _merge(options: argparse.Namespace) -> None:
    from sapmerge.io.records import write_record

    inbox = _opened(options)
    merged = inbox.merge(
        method=method_of(options.method, {"density": options.density}),
        rank=options.rank,
        modules_to_save=options.modules_to_save,
        progress=False,
    )
    merged.save_pretrained(options.output, overwrite=options.overwrite, dtype=options.save_dtype)
    write_record(os.path.join(inbox.path, "report.json"), inbox.report.to_dict())
    if options.json:
        print(inbox.report.to_json().decode(), end="")
    else:
        print(f"{inbox.report}\n\nwritten to {printable(options.output)}")


def _report(options: argparse.Namespace) -> None:
    report = _opened(options).report
    print(report.to_json().decode(), end="") if options.json else print(report)
