"""`sapmerge merge`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import sapmerge
from sapmerge.cli.arguments import (
    adapters_of,
    add_reading_options,
    policy_of,
    rank_of,
    weights_of,
)
from sapmerge.cli.choices import DTYPES, ENGINES, SPELLINGS
from sapmerge.cli.hub import with_hub
from sapmerge.cli.models import add_model_options, anchors_of, loss_of, model_of
from sapmerge.cli.pages import add_page, save_page
from sapmerge.cli.recipe_files import chosen_method, dump_recipe, is_recipe, read_recipe
from sapmerge.cli.scoring import SETUP, setup_of
from sapmerge.display.tables import Look, table
from sapmerge.errors import MethodError, printable

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    merge = commands.add_parser(
        "merge",
        help="merge adapters into one",
        description="Merge adapters into one.",
        epilog="example: sapmerge merge art sketch -o both --method ties --density 0.2",
    )
    merge.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="folder of a PEFT LoRA adapter, label=folder, or hf://user/name@revision; or one "
        "recipe.yaml",
    )
    merge.add_argument("-o", "--output", required=True, help="folder to write")
    how = merge.add_argument_group("how to merge")
    how.add_argument(
        "--method",
        help="a name (`sapmerge methods` lists them), a recipe, or module:function; sap by default "
        "with --anchors",
    )
    how.add_argument("--density", type=float, help="fraction kept, in (0, 1]")
    how.add_argument("--seed", type=int, help="of methods that draw random masks")
    how.add_argument("--weights", help="one number per adapter: --weights=1,0.5,-1")
    how.add_argument("--scale", type=float, default=1.0, help="multiplies the merged update")
    how.add_argument(
        "--modules-to-save", help="heads: mean, first, drop, or module=adapter[,module=adapter]"
    )
    _add_output(merge.add_argument_group("the output"))
    add_reading_options(merge.add_argument_group("the adapters"))
    said = merge.add_argument_group("what is said")
    add_page(said)
    said.add_argument("--json", action="store_true", help="the report as data")
    said.add_argument("-v", "--verbose", action="store_true", help="every layer in the report")
    said.add_argument("--quiet", action="store_true", help="no progress, no report")
    said.add_argument("--dump-recipe", metavar="FILE", help="write this call as a recipe.yaml")
    anchors = add_model_options(merge)
    anchors.add_argument("--setup", help=f"instead of --anchors and --model: {SETUP}")
    anchors.add_argument("--cache", metavar="DIR", help="of the anchors' statistics")
    anchors.add_argument(
        "--cache-only", action="store_true", help="run no model; `sapmerge score` fills the cache"
    )
    merge.set_defaults(run=_merge, parameters=None, modules=None)
    return [merge]


def _add_output(group: Any) -> None:
    group.add_argument(
        "--rank", type=rank_of, help="cap on the rank, share of energy in (0, 1), or 'exact'"
    )
    group.add_argument("--base-model", help="the base model the output is for")
    group.add_argument(
        "--names",
        choices=SPELLINGS,
        help="how the output spells its modules: as the adapters do, or ...",
    )
    group.add_argument("--serving", choices=ENGINES, help="the engine that is to load the output")
    group.add_argument(
        "--save-dtype", choices=DTYPES, help="of the output; by default that of the adapters"
    )
    group.add_argument(
        "--uniform-rank",
        action=argparse.BooleanOptionalAction,
        help="one rank in all modules, padded with zeros (the default)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing output")
    group.add_argument(
        "--push-to-hub", metavar="USER/NAME", help="upload the output to this repository, too"
    )


def _merge(options: argparse.Namespace) -> None:
    if is_recipe(options.adapters):
        read_recipe(options)
    if options.hub:
        options.adapters = with_hub(options.adapters)
    if options.push_to_hub is not None:
        from sapmerge.io.hub import check_name

        check_name(options.push_to_hub)
    if options.dump_recipe is not None:
        dump_recipe(options, options.dump_recipe)
    if options.method is None and options.anchors is None and options.setup is None:
        raise MethodError(
            "which method? --method mean, ties, tsv, ... (`sapmerge methods` lists them); "
            "--anchors DIR and --model give sap"
        )
    method = chosen_method(options)
    loader, model, loss = _anchored(options)
    merged = sapmerge.merge(
        adapters_of(options),
        loader,
        model,
        method=method,
        weights=weights_of(options.weights),
        scale=options.scale,
        rank=None if options.rank is None else rank_of(str(options.rank)),
        loss=loss,
        modules_to_save=policy_of(options.modules_to_save),
        base_model=options.base_model,
        device=options.device,
        progress=False if options.quiet else None,
        cache=options.cache,
        cache_only=options.cache_only,
    )
    os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
    merged.save_pretrained(
        options.output,
        overwrite=options.overwrite,
        names=options.names,
        uniform_rank=options.uniform_rank is not False,
        serving=options.serving,
        dtype=options.save_dtype,
    )
    address = None
    if options.push_to_hub is not None:
        from sapmerge.io.hub import upload

        address = upload(options.output, options.push_to_hub)
    if options.json:
        print(json.dumps(merged.report.to_dict(), indent=2))
    elif not options.quiet:
        look = Look.of(sys.stdout)
        print(merged.report.to_text(look))
        if options.verbose:
            print(f"\n{_every_layer(merged.report)}")
        print(f"\nwritten to {printable(options.output)}")
        if address is not None:
            print(f"uploaded: {printable(address)}")
    save_page(options, lambda: merged.report.plot())


def _anchored(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Anchors, model and loss; a model without anchors stays the path of its folder."""
    if options.setup is not None:
        for flag in ("anchors", "model", "loss", "batch_size", "dtype"):
            if getattr(options, flag) is not None:
                raise MethodError(f"--setup makes what --{flag.replace('_', '-')} names: give one")
        return setup_of(options.setup)
    loader = anchors_of(options)
    if loader is None and options.cache is not None:
        raise MethodError("--cache is of anchors: add --anchors DIR and --model, or --setup")
    if loader is None and (options.model is None or os.path.isdir(options.model)):
        return None, options.model, None
    return loader, model_of(options), loss_of(options)


def _every_layer(report: Any) -> str:
    head = ["layer", "shape", "rank", "energy kept", "norm", "what the method recorded"]
    rows = [
        [
            layer.name,
            "x".join(map(str, layer.shape)),
            layer.rank,
            f"{layer.energy_kept:.1%}",
            f"{layer.norm:.3g}",
            json.dumps(layer.notes, default=str),
        ]
        for layer in report.layers
    ]
    return table(head, rows)
