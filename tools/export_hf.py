"""A checkpoint of a run -> a folder that Hugging Face transformers loads.

stackgrow/cli/export.py has the options; ``stackgrow export`` is the same command.
"""

import sys

from stackgrow.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
