"""One rank among others: signals, ranks, logs, the progress line.

May import: seal, text and errors.
Must never know: what the process works on.
"""
