"""Backends side by side on the same weights and tokens; see ``docs/benchmarks.md``.

``peers.py`` says what a backend must offer, ``measure.py`` alternates and compares, ``report.py`` and
``plot.py`` show what came out, ``command.py`` is ``titans bench``.
"""
