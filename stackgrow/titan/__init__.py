"""The only room that imports torchtitan (pinned: 0.2.2). ``device`` is imported first: it must precede torchtitan."""

from stackgrow.titan import device

device.install()
