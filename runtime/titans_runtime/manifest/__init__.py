"""The manifest ``titans.json``, as frozen dataclasses with explicit checks; see ``docs/format.md``."""

from titans_runtime.manifest.document import FORMAT_VERSION, Manifest
from titans_runtime.manifest.specs import (
    DTYPES,
    FORMATS,
    IDS,
    INITIAL_NAME,
    MAX_TOKENS,
    ONNX,
    ROLES,
    TOKENIZERS,
    VECTORS,
    FileEntry,
    GraphSpec,
    LengthSpec,
    StateSpec,
    TensorSpec,
)

__all__ = [
    "DTYPES",
    "FORMATS",
    "FORMAT_VERSION",
    "IDS",
    "INITIAL_NAME",
    "MAX_TOKENS",
    "ONNX",
    "ROLES",
    "TOKENIZERS",
    "VECTORS",
    "FileEntry",
    "GraphSpec",
    "LengthSpec",
    "Manifest",
    "StateSpec",
    "TensorSpec",
]
