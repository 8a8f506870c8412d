"""What a recipe costs on a cluster: memory, days, GPU-hours, disk, data, and the saving that can be expected.

stackgrow/cli/plan.py has the options; ``stackgrow plan`` is the same command.
"""

import sys

from stackgrow.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
