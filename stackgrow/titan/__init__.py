"""One train stage on torchtitan (pinned: 0.2.2); the only room that imports it.

May import: every room below.
Must never know: benchmarks and provenance: whoever hands over a StageJob is called back.
"""

from stackgrow.titan import device  # first: it must precede torchtitan

device.install()
