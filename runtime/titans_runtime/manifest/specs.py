"""What a manifest says of tensors, graphs, state entries and files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

DTYPES = ("float32", "float16", "int64")
IDS, VECTORS = "input_ids", "inputs"
FORMATS = ("torchscript",)
ROLES = ("memory", "momentum", "anchor", "window", "position")
TOKENIZERS = ("bytes", "ids", "vectors")
INITIAL_NAME = "initial.safetensors"


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output; a string in ``shape`` names a free axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """A graph file and the tensors that it takes and gives.

    ``file`` is ONNX; ``formats`` names the files that hold the same graph for others.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    formats: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The graph as plain JSON types; without formats as bundles of ONNX alone have always said it."""
        content = asdict(self)
        if not self.formats:
            del content["formats"]
        return content


@dataclass(frozen=True)
class StateSpec:
    """One tensor of the state. ``shape`` begins with ``"batch"``.

    ``initial`` fills it at the start: a number, or the name of the file that holds its row.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    initial: float | str
    role: str

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape without the batch axis."""
        return tuple(axis for axis in self.shape[1:] if isinstance(axis, int))


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    sha256: str
    size: int
