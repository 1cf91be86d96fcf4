"""The PyTorch model in the ways that PyTorch and others run it, as backends of ``titans bench``.

The runtime finds their loaders by entry point; see ``docs/benchmarks.md``.
"""
