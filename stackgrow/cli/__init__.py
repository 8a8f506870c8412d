"""The user's verbs: one page each, which reads a command line, calls the rooms below, and tells what came of it.

May import: every room below.
Must never know: anything that a caller from Python would miss: what is worth doing is a function elsewhere.
"""
