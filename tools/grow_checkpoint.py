"""Grow a checkpoint without a recipe.

stackgrow/cli/grow.py has the options; ``stackgrow grow`` is the same command.
"""

import sys

from stackgrow.cli.grow import main

if __name__ == "__main__":
    sys.exit(main())
