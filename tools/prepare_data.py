"""Text files -> a token store that recipes name as data.path.

    python tools/prepare_data.py --stdlib --train-tokenizer 2048 --out data/quickstart
    python tools/prepare_data.py --input corpus --pattern '**/*.txt' --tokenizer my.model --out data/corpus

Running it again on the same inputs changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stackgrow.data.prepare import Source, prepare, stdlib_source, summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, nargs="+", action="extend", default=[], help="folders of text files")
    parser.add_argument("--pattern", default="**/*", help="files to take, relative to --input (default: all)")
    parser.add_argument("--exclude", action="append", default=[], help="files to leave out; may be repeated")
    parser.add_argument("--stdlib", action="store_true", help="take Python's standard library, too")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--train-tokenizer", type=int, metavar="VOCAB", help="train one of this many pieces")
    which.add_argument("--tokenizer", type=Path, metavar="FILE.model", help="use this SentencePiece model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--validation", type=float, default=0.02, help="share held out (default: 0.02)")
    parser.add_argument("--tokens-per-shard", type=int, default=2**26, help="default: 2**26")
    args = parser.parse_args()
    if not args.input and not args.stdlib:
        parser.error("name what to prepare: --input FOLDER, or --stdlib")

    sources = [Source(root, args.pattern, tuple(args.exclude)) for root in args.input]
    try:
        manifest, written = prepare(
            [*sources, stdlib_source()] if args.stdlib else sources,
            args.out,
            tokenizer=args.tokenizer or args.train_tokenizer,
            validation=args.validation,
            tokens_per_shard=args.tokens_per_shard,
        )
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(summary(manifest, written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
