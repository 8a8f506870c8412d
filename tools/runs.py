"""The runs in a folder: how far each has come, what it takes on disk, and what of that can go.

stackgrow/cli/runs.py has the options; ``stackgrow runs`` is the same command.
"""

import sys

from stackgrow.cli.runs import main

if __name__ == "__main__":
    sys.exit(main())
