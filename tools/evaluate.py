"""Benchmarks of a run's checkpoint, by lm-eval, on as many ranks as are started; results into the run's eval/.

stackgrow/cli/evaluate.py has the options; ``stackgrow evaluate`` is the same command.
"""

import sys

from stackgrow.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
