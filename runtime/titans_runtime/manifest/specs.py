"""What a manifest says of tensors, graphs, state entries and files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

DTYPES = ("float32", "float16", "int64")
IDS, VECTORS = "input_ids", "inputs"
ONNX = "onnx"
FORMATS = ("torchscript", "aoti")
MAX_TOKENS = 512
"""Tokens that a call of a graph takes at most; what runs it cuts longer input."""
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
class LengthSpec:
    """A file that holds a graph for one number of tokens, and its format: ``onnx``, or one of the others."""

    tokens: int
    format: str
    file: str


@dataclass(frozen=True)
class GraphSpec:
    """A graph file and the tensors that it takes and gives.

    ``file`` is ONNX; ``formats`` names the files that hold the same graph for others. Where ``lengths`` has a
    file for the number of tokens at hand, that one is to be taken. A graph whose own file is among them
    knows no other numbers: what it is given is cut.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    formats: dict[str, str] = field(default_factory=dict)
    lengths: tuple[LengthSpec, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The graph as plain JSON types; without what it does not have, as bundles have always said it."""
        content = asdict(self)
        for name in ("formats", "lengths"):
            if not content[name]:
                del content[name]
        return content

    def own_file(self, kind: str = ONNX) -> str | None:
        """The graph's own file in a format, or None."""
        return self.file if kind == ONNX else self.formats.get(kind)

    def files_by_length(self, kind: str = ONNX) -> dict[int, str]:
        """Tokens → file in a format, where there are files for given numbers of tokens."""
        return {one.tokens: one.file for one in self.lengths if one.format == kind}

    def takes_any_length(self, kind: str = ONNX) -> bool:
        """Whether the graph's own file takes any number of tokens, but for those in ``lengths``."""
        own = self.own_file(kind)
        return own is not None and own not in self.files_by_length(kind).values()

    def at(self, tokens: int) -> GraphSpec:
        """The tensors of a call of so many tokens."""

        def fixed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(
                replace(one, shape=tuple(tokens if axis == "tokens" else axis for axis in one.shape))
                for one in tensors
            )

        return replace(self, inputs=fixed(self.inputs), outputs=fixed(self.outputs))


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
