"""Text -> token store -> batches, in an order that is a pure function of (data manifest, seed, position)."""
