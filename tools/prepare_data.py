"""Text -> a token store that recipes name as data.path.

stackgrow/cli/prepare.py has the options; ``stackgrow prepare`` is the same command.
"""

import sys

from stackgrow.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
