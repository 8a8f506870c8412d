"""Audit a run: is it what it claims to be, from the recipe to the final weights?

stackgrow/cli/audit.py has the options; ``stackgrow audit`` is the same command.
"""

import sys

from stackgrow.cli.audit import main

if __name__ == "__main__":
    sys.exit(main())
