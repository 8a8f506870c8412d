"""A Plan executed: one run folder, stage by stage, resumable at any moment.

May import: every room below.
Must never know: how an operator computes a weight, or how an audit looks at what was left.
"""
