"""Titans models in PyTorch: the reference, its training, and its export."""
