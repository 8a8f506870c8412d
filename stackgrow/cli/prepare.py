"""Text -> a token store that recipes name as data.path.

    python tools/prepare_data.py --stdlib --train-tokenizer 2048 --out data/stdlib
    python tools/prepare_data.py --input corpus --pattern '**/*.jsonl.zst' --tokenizer llama2.model --out data/corpus
    python tools/prepare_data.py --input hf://datasets/cerebras/SlimPajama-627B --preset slimpajama \\
        --tokenizer llama2.model --out data/slimpajama --slurm cpu

Files *.jsonl and *.parquet hold a document per line or row, all others one each; .zst, .gz and .bz2 are read as they
are. What stops it, does not matter: the same command goes on, and on the same inputs it changes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import quiet_at_closed_pipe
from stackgrow.data.inspect import summary
from stackgrow.data.prepare import PRESETS, prepare
from stackgrow.data.read import Source, stdlib_source
from stackgrow.data.store import DOCUMENT_ENDS


def key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} must be KEY=VALUE")
    return key, value


def usable_cpus() -> int:
    """Those that this process may run on, where the system tells; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_inputs(parser)
    _add_tokens(parser)
    _add_work(parser)
    preset = parser.parse_known_args(argv)[0].preset
    if preset:
        parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    if not args.input and not args.stdlib:
        parser.error("name what to prepare: --input FOLDER, or --stdlib")
    if args.train_tokenizer is None and args.tokenizer is None and not args.append:
        parser.error("name the tokenizer: --tokenizer PATH, or --train-tokenizer VOCAB")
    return args


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """Which files, and which documents in them."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        help="folders, or URLs that fsspec knows",
    )
    add(
        "--pattern",
        default="**/*",
        help="files to take, relative to --input (default: all)",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        help="files to leave out; may be repeated",
    )
    add("--stdlib", action="store_true", help="take Python's standard library, too")
    add("--preset", choices=PRESETS, help="options that a known corpus needs")
    add(
        "--text-key",
        default="text",
        help="where JSON and Parquet hold the text (default: text)",
    )
    drop_help = (
        "leave out documents with this value, such as meta.lang=fr; may be repeated"
    )
    add(
        "--drop",
        action="append",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help=drop_help,
    )


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    """What they become."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB",
        help="train one of this many pieces",
    )
    tokenizer_help = "a SentencePiece model, a tokenizer.json, or the folder of one"
    which.add_argument("--tokenizer", type=Path, metavar="PATH", help=tokenizer_help)
    add = parser.add_argument
    add(
        "--bos",
        metavar="TOKEN",
        help="the tokenizer's BOS, where it does not say itself which it is",
    )
    ends_help = (
        "BOS before each document (default), EOS after it (as the paper), or both"
    )
    add("--document-ends", choices=DOCUMENT_ENDS, help=ends_help)
    add("--validation", type=float, default=0.02, help="share held out (default: 0.02)")


def _add_work(parser: argparse.ArgumentParser) -> None:
    """Where they go, and who does it."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add(
        "--append",
        action="store_true",
        help="add to the store --out, with its tokenizer",
    )
    add("--tokens-per-shard", type=int, default=2**26, help="at most (default: 2**26)")
    add("--workers", type=int, default=usable_cpus(), help="processes (default: all)")
    add(
        "--slurm",
        metavar="PARTITION",
        help="run on Slurm, --workers at a time, and return at once",
    )
    add(
        "--slurm-time",
        default="24:00:00",
        help="time limit of a task (default: 24:00:00)",
    )


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    sources = [Source(root, args.pattern, tuple(args.exclude)) for root in args.input]
    if args.stdlib:
        sources.append(stdlib_source())
    slurm = None
    if args.slurm:
        slurm = {
            "partition": args.slurm,
            "time": args.slurm_time,
            "workers": args.workers,
        }
    try:
        manifest, written = prepare(
            sources,
            args.out,
            tokenizer=args.tokenizer or args.train_tokenizer,
            bos=args.bos,
            document_ends=args.document_ends,
            validation=args.validation,
            tokens_per_shard=args.tokens_per_shard,
            text_key=args.text_key,
            drop=args.drop,
            workers=args.workers,
            append=args.append,
            slurm=slurm,
        )
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: interrupted; the same command goes on", file=sys.stderr)
        return 130
    if manifest is None:
        print(f"Slurm is at work; {args.out} appears when all is done")
    else:
        print(summary(manifest, "prepared" if written else "already prepared"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
