"""Benchmarks of a checkpoint, scored on the ranks that train it.

May import: every room below.
Must never know: who asked for an evaluation, and what a run does between its stages.
"""
