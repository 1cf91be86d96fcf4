"""The memory kernel by itself on a GPU."""
