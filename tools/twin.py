"""The equal-FLOPs scratch twin of a recipe, written as a recipe.

stackgrow/cli/twin.py has the options; ``stackgrow twin`` is the same command.
"""

import sys

from stackgrow.cli.twin import main

if __name__ == "__main__":
    sys.exit(main())
