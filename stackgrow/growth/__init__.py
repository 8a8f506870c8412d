"""The operators: pure descriptions of how target tensors come from source tensors.

May import: recipe, text and errors.
Must never know: files, checkpoints, ranks and torchtitan.
"""
