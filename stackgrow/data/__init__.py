"""Text -> token store -> batches, in an order that is a pure function of (data manifest, seed, position).

May import: process, recipe and what lies below them.
Must never know: models, stages and growth: a position in the data is one integer.
"""
