"""Grow a checkpoint without a recipe.

python tools/grow_checkpoint.py runs/mine/stage-0-train-8L/checkpoint/step-500 grown --operator stack --factor 4
python tools/grow_checkpoint.py TinyLlama_v1.1 grown --operator zero --factor 2 --order interleave
torchrun --standalone --nproc-per-node 8 tools/grow_checkpoint.py base grown --operator split \\
    --dim 4096 --heads 32 --ffn-dim 11264 --source-heads 16

SRC is a DCP checkpoint, or a Hugging Face model folder with safetensors. DST becomes a DCP checkpoint with a seal
(MANIFEST.json) and growth.json; tools/export_hf.py makes a Hugging Face folder of it. Exit codes: 2 for a growth that
is not defined, 65 for a checkpoint that is damaged or in the way, 74 for a disk that is full or fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from stackgrow.cli.options import parser_of, quiet_at_closed_pipe, tell
from stackgrow.errors import RunError
from stackgrow.growth import own
from stackgrow.growth.depth import interleave_map, stack_map
from stackgrow.growth.operators import OPERATORS
from stackgrow.growth.rules import GrowthError
from stackgrow.plan.checks_growth import MAX_LAYERS
from stackgrow.plan.stages import GrowStage
from stackgrow.recipe.keys import Model


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    from torch import distributed as dist

    from stackgrow.checkpoint.standalone import Ranks, grow_folder

    ranks = Ranks(
        int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    )
    if ranks.size > 1:
        dist.init_process_group(
            "gloo", timeout=timedelta(days=1)
        )  # rank 0 may import for hours
    try:
        growth = grow_folder(
            arguments.source,
            arguments.target,
            lambda model: stage_of(model, arguments),
            given=chosen(arguments, "source_"),
            ranks=ranks,
            tell=lambda stage: print(described(stage), flush=True),
        )
        if ranks.rank == 0:
            print(summary(arguments.target, growth))
    except RunError as error:
        return tell(error)
    finally:
        if ranks.size > 1:
            dist.destroy_process_group()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument(
        "target", type=Path, metavar="DST", help="folder to write; must not exist"
    )
    parser.add_argument(
        "--operator", required=True, type=operator, metavar="NAME", help=operator_help()
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--factor", type=positive, metavar="N", help="layers after / layers before"
    )
    depth.add_argument(
        "--layer-map",
        type=layers,
        metavar="0,1,0,1",
        help="the source layer of each grown layer",
    )
    parser.add_argument(
        "--order",
        choices=["stack", "interleave"],
        help="with --factor: 0 1 0 1 (default), or 0 0 1 1",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="A",
        help="share of random weights blended in",
    )
    parser.add_argument(
        "--optimizer",
        choices=["copy", "asymmetric"],
        help="grow AdamW's moments too (default: none)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of new weights, uneven shares and noise (default: 0)",
    )
    _add_widths(parser)
    arguments = parser.parse_args(argv)
    if arguments.order and not arguments.factor:
        parser.error("--order has a meaning with --factor only")
    return arguments


def _add_widths(parser: argparse.ArgumentParser) -> None:
    grown = parser.add_argument_group(
        "widths of the grown model; those that are not given stay"
    )
    known = parser.add_argument_group(
        "source geometry, for a DCP folder that lies in no run and was not written here"
    )
    for group, prefix in ((grown, "--"), (known, "--source-")):
        name = "target_" if group is grown else "source_"
        group.add_argument(
            f"{prefix}heads", type=positive, metavar="N", dest=f"{name}n_heads"
        )
        group.add_argument(
            f"{prefix}norm-eps", type=float, metavar="E", dest=f"{name}norm_eps"
        )
    grown.add_argument("--dim", type=positive, metavar="N", dest="target_dim")
    grown.add_argument(
        "--kv-heads", type=positive, metavar="N", dest="target_n_kv_heads"
    )
    grown.add_argument("--ffn-dim", type=positive, metavar="N", dest="target_ffn_dim")
    known.add_argument("--source-rope-theta", type=float, metavar="T")


def needs_no_training() -> list[str]:
    """The operators that grow a checkpoint at once: no maps to train first, no mask to raise afterwards."""
    return [
        row.name for row in OPERATORS.values() if not row.learned and not row.masked
    ]


def operator_help() -> str:
    return f"{', '.join(needs_no_training())}, or a function of your own, my_package.my_module:rules"


def operator(text: str) -> str:
    if own.is_own(text):
        own.trust()  # who typed it here wants it to run
    elif text not in needs_no_training():
        raise argparse.ArgumentTypeError(f"{text!r} is none of {operator_help()}")
    return text


def positive(text: str) -> int:
    if not 1 <= (number := int(text)) <= 2**31:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def chosen(arguments: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The given options of one group, as keys of Model."""
    options = vars(arguments).items()
    return {
        name.removeprefix(prefix): value
        for name, value in options
        if name.startswith(prefix) and value is not None
    }


def stage_of(source: Model, arguments: argparse.Namespace) -> GrowStage:
    """What the options ask for, of this source."""
    from stackgrow.plan.parts import resized

    n, factor, layer_map, widths = (
        source.n_layers,
        arguments.factor,
        arguments.layer_map,
        chosen(arguments, "target_"),
    )
    if factor is None and layer_map is None and not widths:
        raise GrowthError(
            "nothing grows: give --factor, --layer-map or widths such as --dim"
        )
    if max(n * (factor or 1), len(layer_map or ())) > MAX_LAYERS:
        raise GrowthError(f"more than {MAX_LAYERS} layers: choose a smaller --factor")
    if factor:
        layer_map = tuple(
            (interleave_map if arguments.order == "interleave" else stack_map)(
                n, n * factor
            )
        )
    target = resized(source, widths, len(layer_map) if layer_map else n)
    drawn = arguments.noise, arguments.seed
    return GrowStage(
        0,
        source,
        target,
        arguments.operator,
        layer_map,
        *drawn,
        optimizer=arguments.optimizer,
    )


def described(stage: GrowStage) -> str:
    lines = [
        f"{stage.operator}: {stage.change}",
        f"{stage.source.parameters()} -> {stage.target.parameters()} parameters",
    ]
    if stage.layer_map:
        lines.append(
            f"source layer of each layer: {' '.join(map(str, stage.layer_map))}"
        )
    if stage.source.norm_eps != stage.target.norm_eps:
        lines.append(f"norm_eps {stage.source.norm_eps:g} -> {stage.target.norm_eps:g}")
    if stage.noise:
        lines.append(f"noise {stage.noise:g}")
    return "\n".join(lines)


def summary(target: Path, growth: dict[str, Any]) -> str:
    files = f"{len(growth['linked_files'])} files linked, {len(growth['copied_files'])} copied"
    dropped = (
        f", {len(growth['dropped'])} source tensors dropped"
        if growth["dropped"]
        else ""
    )
    return f"{target}  {len(growth['tensors'])} tensors, {growth['bytes_written']} bytes written, {files}{dropped}"


if __name__ == "__main__":
    sys.exit(main())
