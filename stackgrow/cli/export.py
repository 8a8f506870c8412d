"""A checkpoint of a run -> a folder that Hugging Face transformers loads.

python tools/export_hf.py runs/quickstart exported                            the last finished stage
python tools/export_hf.py runs/quickstart exported --stage stage-0-train-2L --step 100
python tools/export_hf.py runs/quickstart/stage-1-grow/checkpoint exported --dtype bfloat16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import parser_of, quiet_at_closed_pipe
from stackgrow.data.tokenizer import TokenizerError
from stackgrow.errors import RunError


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "source", type=Path, help="a run folder, or one of its checkpoints"
    )
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--stage", help="of a run: stage to export (default: the last finished one)"
    )
    parser.add_argument(
        "--step",
        type=int,
        help="of a run: checkpoint to export (default: the stage's newest)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32; of a model that came from Hugging Face, its own",
    )
    arguments = parser.parse_args(argv)
    try:
        from stackgrow.checkpoint.export import export_run

        options = {
            "stage": arguments.stage,
            "step": arguments.step,
            "dtype": arguments.dtype,
        }
        print(export_run(arguments.source, arguments.target, **options))
    except (RunError, TokenizerError) as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, RunError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
