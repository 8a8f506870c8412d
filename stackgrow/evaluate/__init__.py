"""What becomes of a checkpoint: import and export in the format of Hugging Face."""
