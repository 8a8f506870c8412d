"""Builds every stage of a recipe as one rank of many, traces a step, and compares its bytes with the planner's.

stackgrow/cli/dry_run.py has the options; ``stackgrow dry-run`` is the same command.
"""

import sys

from stackgrow.cli.dry_run import main

if __name__ == "__main__":
    sys.exit(main())
