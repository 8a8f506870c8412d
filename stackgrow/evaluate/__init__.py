"""What becomes of a checkpoint: benchmarks, and import and export in the format of Hugging Face."""
