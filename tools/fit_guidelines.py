"""Growth timing from a sweep: IsoFLOP valleys, the guideline d(N, C) and scaling laws, as in the paper's section 4.2.

stackgrow/cli/fit.py has the options; ``stackgrow fit`` is the same command.
"""

import sys

from stackgrow.cli.fit import main

if __name__ == "__main__":
    sys.exit(main())
