"""Converters from PyTorch modules to the files of a bundle."""
