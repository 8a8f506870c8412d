"""Many runs of one recipe, one for every combination of values.

stackgrow/cli/sweep.py has the options; ``stackgrow sweep`` is the same command.
"""

import sys

from stackgrow.cli.sweep import main

if __name__ == "__main__":
    sys.exit(main())
