"""Run a recipe, or print its plan.

stackgrow/cli/run.py has the options; ``stackgrow run`` is the same command.
"""

import sys

from stackgrow.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
