"""The manifest ``titans.json``, as frozen dataclasses with explicit checks; see ``docs/format.md``."""

from titans_runtime.manifest.document import FORMAT_VERSION, Manifest
from titans_runtime.manifest.specs import (
    DTYPES,
    FORMATS,
    IDS,
    INITIAL_NAME,
    ROLES,
    TOKENIZERS,
    VECTORS,
    FileEntry,
    GraphSpec,
    StateSpec,
    TensorSpec,
)

__all__ = [
    "DTYPES",
    "FORMATS",
    "FORMAT_VERSION",
    "IDS",
    "INITIAL_NAME",
    "ROLES",
    "TOKENIZERS",
    "VECTORS",
    "FileEntry",
    "GraphSpec",
    "Manifest",
    "StateSpec",
    "TensorSpec",
]
