"""Growth operators: how target tensors come from source tensors, and their use on disk."""
