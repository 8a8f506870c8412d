"""One train stage on torchtitan (pinned: 0.2.2); the only room that imports it.

May import: every room below.
Must never know: benchmarks and provenance: whoever hands over a StageJob is called back.
"""

import importlib.util

from stackgrow.errors import MissingExtraError

if importlib.util.find_spec("triton") is None:
    raise MissingExtraError(
        "training needs the package triton, which torchtitan imports. On Linux: pip install triton. It exists for no "
        "other system; there, recipes can be planned and data prepared"
    )

from stackgrow.titan import device  # first: it must precede torchtitan

device.install()
