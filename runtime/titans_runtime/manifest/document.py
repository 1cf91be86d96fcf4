"""The manifest as a whole: its fields, and the identity that follows from them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

from titans_runtime.errors import BundleError
from titans_runtime.json_reader import canonical
from titans_runtime.manifest import reading
from titans_runtime.manifest.checks import check_consistency
from titans_runtime.manifest.fields import Fields
from titans_runtime.manifest.specs import (
    IDS,
    TOKENIZERS,
    VECTORS,
    FileEntry,
    GraphSpec,
    StateSpec,
    TensorSpec,
)

FORMAT_VERSION = 1
_MAX_LAYERS = 2**16
_SIZES = {"float32": 4, "float16": 2, "int64": 8}


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime must know before it opens another file of the bundle."""

    format_version: int
    identity: str
    producer: dict[str, str]
    requires: dict[str, Any]
    model: dict[str, Any]
    tokenizer: str
    vocab_size: int
    edit_layers: int
    graphs: dict[str, GraphSpec]
    state: tuple[StateSpec, ...]
    tolerances: dict[str, float]
    recommended: dict[str, Any]
    files: dict[str, FileEntry]

    @property
    def sequence(self) -> TensorSpec:
        """The input that has an axis of tokens: ids ``(batch, tokens)``, or vectors with one axis more."""
        return _named(self.graphs["model"].inputs, VECTORS if self.tokenizer == "vectors" else IDS)

    @property
    def scores(self) -> TensorSpec:
        """The output that belongs to it, ``(batch, tokens, width)``: logits, or answers to vectors."""
        return _named(self.graphs["model"].outputs, "outputs" if self.tokenizer == "vectors" else "logits")

    @property
    def width(self) -> int:
        """Last axis of :attr:`scores`."""
        return int(self.scores.shape[-1])

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's state."""
        return sum(_SIZES[entry.dtype] * math.prod(entry.row_shape) for entry in self.state)

    @classmethod
    def create(
        cls,
        *,
        producer: dict[str, str],
        requires: dict[str, Any],
        model: dict[str, Any],
        tokenizer: str,
        vocab_size: int,
        edit_layers: int,
        graphs: dict[str, GraphSpec],
        state: tuple[StateSpec, ...],
        tolerances: dict[str, float],
        recommended: dict[str, Any],
        files: dict[str, FileEntry],
    ) -> Manifest:
        """A manifest of the current format, with the identity that follows from its content."""
        return cls(
            format_version=FORMAT_VERSION,
            identity=identity_of(model, graphs, state, files),
            producer=producer,
            requires=requires,
            model=model,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            edit_layers=edit_layers,
            graphs=graphs,
            state=state,
            tolerances=tolerances,
            recommended=recommended,
            files=files,
        )

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON types."""
        return asdict(self) | {"graphs": {name: graph.to_dict() for name, graph in self.graphs.items()}}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Manifest:
        """Read a manifest from parsed JSON.

        Raises:
            BundleError: an unknown format version, a missing, unknown or malformed field, or an
                identity that does not follow from the content.
        """
        reader = Fields(content, "titans.json")
        version = reader.integer("format_version", 1)
        if version != FORMAT_VERSION:
            raise BundleError(
                f"titans.json: format version {version}; this runtime reads {FORMAT_VERSION}. "
                "Export again, or install a newer titans-runtime"
            )
        graphs, files = reader.mapping("graphs").items(), reader.mapping("files").items()
        state = enumerate(reader.array("state"))
        manifest = cls(
            format_version=version,
            identity=reader.digest("identity"),
            producer={name: str(value) for name, value in reader.mapping("producer").items()},
            requires=reading.requires(reader),
            model=reader.mapping("model"),
            tokenizer=reader.choice("tokenizer", TOKENIZERS),
            vocab_size=reader.integer("vocab_size", 0),
            edit_layers=reader.integer("edit_layers", 0, _MAX_LAYERS),
            graphs={name: reading.graph_spec(value, f"graphs.{name}") for name, value in graphs},
            state=tuple(reading.state_spec(value, f"state[{i}]") for i, value in state),
            tolerances=reading.tolerances(reader),
            recommended=reading.recommended(reader),
            files={name: reading.file_entry(value, f"files.{name}") for name, value in files},
        )
        reader.end()
        check_consistency(manifest)
        _check_identity(manifest)
        return manifest


def identity_of(
    model: dict[str, Any],
    graphs: dict[str, GraphSpec],
    state: tuple[StateSpec, ...],
    files: dict[str, FileEntry],
) -> str:
    """What a memory knows a bundle by: SHA-256 of all that its graphs compute."""
    content = {
        "model": model,
        "graphs": {name: graph.to_dict() for name, graph in graphs.items()},
        "state": [asdict(entry) for entry in state],
        "files": {name: asdict(entry) for name, entry in files.items()},
    }
    return hashlib.sha256(canonical(content)).hexdigest()


def _check_identity(manifest: Manifest) -> None:
    try:
        identity = identity_of(manifest.model, manifest.graphs, manifest.state, manifest.files)
    except ValueError:  # a file cannot hold such a number; a program can hand it over
        raise BundleError("titans.json: model holds a number that is not finite; JSON has none") from None
    if identity != manifest.identity:
        raise BundleError(
            f"titans.json: identity {manifest.identity[:12]}… does not belong to the content "
            f"({identity[:12]}…); the manifest was altered"
        )


def _named(tensors: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    return next(tensor for tensor in tensors if tensor.name == name)
