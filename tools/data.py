"""Look at token stores and at what a recipe trains on.

stackgrow/cli/data.py has the options; ``stackgrow inspect`` and ``stackgrow verify`` are the same commands.
"""

import sys

from stackgrow.cli.data import main

if __name__ == "__main__":
    sys.exit(main())
