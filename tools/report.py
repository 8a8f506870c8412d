"""report.html of a run, or of several beside the first: one file, everything in it.

stackgrow/cli/report.py has the options; ``stackgrow report`` is the same command.
"""

import sys

from stackgrow.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
