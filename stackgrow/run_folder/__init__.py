"""Every path and every record of a run, spelled once; what ran, on what, from what.

May import: every room below.
Must never know: how a stage is trained or grown, and how what is found here is shown.
"""
