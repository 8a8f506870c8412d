"""One thread for each of pytest's processes: with the default, one for each core, four processes on two cores wait for
each other in every matrix product, and such tests take three times as long."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
