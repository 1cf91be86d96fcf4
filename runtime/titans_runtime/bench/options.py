"""The options of ``titans bench``. Imports nothing heavy: every command's parser is built at every start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

REFERENCE: Final = "onnxruntime"
"""The backend that all others are compared with."""

LEAST_ROUNDS: Final = 5
"""The spread of fewer says nothing."""

TOLERANCES: Final = {"float32": 1e-4, "float16": 5e-3, "int8": 0.1, "int4": 0.5}
"""What logits may differ by, of the largest, by the coarser of the two bundles' types of weights."""

FORMATS: Final = ("md", "csv", "json", "plot")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``titans bench``; lists are separated by commas, and every combination is timed."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--backend",
        default=REFERENCE,
        metavar="NAME,…",
        help=f"beside {REFERENCE}: names, which a wrong one lists, or all",
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="[BACKEND:]BUNDLE",
        help=f"another bundle of the model, in {REFERENCE} or the backend named; may be given several times",
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=None, metavar="DIR", help="the bundle's, for PyTorch's backends"
    )
    parser.add_argument("-p", "--prefill", default="512", metavar="N,…", help="tokens at once; 0 for none")
    parser.add_argument("-n", "--decode", default="128", metavar="N,…", help="tokens one by one; 0 for none")
    parser.add_argument("-b", "--batch", default="1", metavar="N,…", help="streams side by side")
    parser.add_argument("-t", "--threads", default="1", metavar="N,…")
    parser.add_argument("-e", "--edit", default="1", metavar="0..1,…", help="strength of the fused rule")
    parser.add_argument("--editor", default=None, metavar="SPEC", help="open editing, as in readout:step=1")
    parser.add_argument("-r", "--rounds", type=int, default=LEAST_ROUNDS, help="alternations, 5 or more")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        help="of the largest logit; what differs by more is not timed; by default "
        + ", ".join(f"{value:g} for {name}" for name, value in TOLERANCES.items()),
    )
    parser.add_argument("-o", "--output", default="md", metavar="FORMAT,…", help=", ".join(FORMATS))
    parser.add_argument(
        "--out", type=Path, default=None, metavar="STEM", help="write STEM.md and so on, in place of stdout"
    )
    parser.add_argument(
        "--work", type=Path, default=None, metavar="DIR", help="keep what backends build for this bundle"
    )
