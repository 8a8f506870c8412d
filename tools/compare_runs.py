"""Compare runs with the first of them: the iso-loss speed-up in FLOPs and tokens, and the benchmarks.

stackgrow/cli/compare.py has the options; ``stackgrow compare`` is the same command.
"""

import sys

from stackgrow.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
