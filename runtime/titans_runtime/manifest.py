"""The manifest ``titans.json``, as frozen dataclasses with explicit checks; see ``docs/format.md``."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from titans_runtime.editor import Editor
from titans_runtime.errors import BundleError, UsageError
from titans_runtime.json_reader import canonical

FORMAT_VERSION = 1
DTYPES = ("float32", "float16", "int64")
IDS, VECTORS = "input_ids", "inputs"
FORMATS = ("torchscript",)
ROLES = ("memory", "momentum", "anchor", "window", "position")
TOKENIZERS = ("bytes", "ids", "vectors")
INITIAL_NAME = "initial.safetensors"
_LARGEST = 3e38  # what float32 holds
_MAX_AXIS = 2**31 - 1
_LARGEST_INTEGER = 2**63 - 1
_MAX_LAYERS = 2**16
_MAX_TENSOR = 2**30  # elements of a tensor, at one batch row and as many tokens as a call takes at once
_MOST = {"tokens": 512}
_MAX_STATE = 4 * 2**30  # bytes of one session
_SIZES = {"float32": 4, "float16": 2, "int64": 8}


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
            identity=_identity(model, graphs, state, files),
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
        reader = _Fields(content, "titans.json")
        version = reader.integer("format_version", 1)
        if version != FORMAT_VERSION:
            raise BundleError(
                f"titans.json: format version {version}; this runtime reads {FORMAT_VERSION}. "
                "Export again, or install a newer titans-runtime"
            )
        manifest = cls(
            format_version=version,
            identity=reader.digest("identity"),
            producer={name: str(value) for name, value in reader.mapping("producer").items()},
            requires=_requires(reader),
            model=reader.mapping("model"),
            tokenizer=reader.choice("tokenizer", TOKENIZERS),
            vocab_size=reader.integer("vocab_size", 0),
            edit_layers=reader.integer("edit_layers", 0, _MAX_LAYERS),
            graphs={
                name: _graph(value, f"graphs.{name}") for name, value in reader.mapping("graphs").items()
            },
            state=tuple(_state(value, f"state[{i}]") for i, value in enumerate(reader.array("state"))),
            tolerances=_tolerances(reader),
            recommended=_recommended(reader),
            files={name: _file(value, f"files.{name}") for name, value in reader.mapping("files").items()},
        )
        reader.end()
        _check_consistency(manifest)
        return manifest


def _identity(
    model: dict[str, Any],
    graphs: dict[str, GraphSpec],
    state: tuple[StateSpec, ...],
    files: dict[str, FileEntry],
) -> str:
    content = {
        "model": model,
        "graphs": {name: graph.to_dict() for name, graph in graphs.items()},
        "state": [asdict(entry) for entry in state],
        "files": {name: asdict(entry) for name, entry in files.items()},
    }
    return hashlib.sha256(canonical(content)).hexdigest()


def _check_consistency(manifest: Manifest) -> None:
    if "model" not in manifest.graphs:
        raise BundleError("titans.json: graphs has no 'model'")
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            raise BundleError(f"titans.json: graphs.{name}.file {graph.file!r} is not among the files")
        for kind, file in graph.formats.items():
            if file not in manifest.files:
                raise BundleError(
                    f"titans.json: graphs.{name}.formats.{kind} {file!r} is not among the files"
                )
    if manifest.state_bytes > _MAX_STATE:
        raise BundleError(
            f"titans.json: state takes {manifest.state_bytes} bytes a session; the limit is {_MAX_STATE}"
        )
    names = [entry.name for entry in manifest.state]
    if len(set(names)) != len(names):
        raise BundleError("titans.json: two state entries have the same name")
    _check_vocabulary(manifest)
    sequence = VECTORS if manifest.tokenizer == "vectors" else IDS
    expected = {sequence, "edit", *(f"past.{name}" for name in names)}
    if {tensor.name for tensor in manifest.graphs["model"].inputs} != expected:
        raise BundleError("titans.json: the inputs of graph 'model' do not follow from the state schema")
    learned = any(entry.initial == INITIAL_NAME for entry in manifest.state)
    if learned and INITIAL_NAME not in manifest.files:
        raise BundleError(f"titans.json: state begins as in {INITIAL_NAME!r}, which is not among the files")
    _check_widths(manifest)
    if manifest.tokenizer == "bytes" and manifest.vocab_size > 256:
        raise BundleError(f"titans.json: vocab_size is {manifest.vocab_size}; a tokenizer of bytes has 256")
    identity = _identity(manifest.model, manifest.graphs, manifest.state, manifest.files)
    if identity != manifest.identity:
        raise BundleError(
            f"titans.json: identity {manifest.identity[:12]}… does not belong to the content "
            f"({identity[:12]}…); the manifest was altered"
        )


def _check_vocabulary(manifest: Manifest) -> None:
    """Whether there is a vocabulary, and of which size, as the tokenizer asks for."""
    tokenizer, size = manifest.tokenizer, manifest.vocab_size
    if (tokenizer == "vectors") != (size == 0):
        raise BundleError(f"titans.json: vocab_size is {size}, which the tokenizer {tokenizer!r} cannot have")


def _check_widths(manifest: Manifest) -> None:
    """The sizes that the manifest states twice: a buffer of another size would fail in the graph."""
    graph = manifest.graphs["model"]
    inputs = {tensor.name: tensor.shape for tensor in graph.inputs}
    outputs = {tensor.name: tensor.shape for tensor in graph.outputs}
    for where, found, expected in (
        ("edit", inputs["edit"], ("batch", manifest.edit_layers)),
        *_sequence_widths(manifest, inputs, outputs),
        *((f"past.{entry.name}", inputs[f"past.{entry.name}"], entry.shape) for entry in manifest.state),
    ):
        if found != expected:
            raise BundleError(
                f"titans.json: graphs.model: {where} has shape {found}; the other fields ask for {expected}"
            )


def _sequence_widths(
    manifest: Manifest, inputs: dict[str, tuple[int | str, ...]], outputs: dict[str, tuple[int | str, ...]]
) -> list[tuple[str, tuple[int | str, ...] | None, tuple[int | str, ...]]]:
    """Found and expected shapes of what has an axis of tokens."""
    if manifest.tokenizer == "vectors":
        pairs = [(VECTORS, inputs), ("outputs", outputs)]
        return [(name, of.get(name), ("batch", "tokens", _size(of, name))) for name, of in pairs]
    found = [
        (IDS, inputs[IDS], ("batch", "tokens")),
        ("logits", outputs.get("logits"), ("batch", "tokens", manifest.vocab_size)),
    ]
    keys = ("readout_key", "readout_rows")
    if any(entry.name == "readout" for entry in manifest.state) or outputs.keys() & set(keys):
        found += [(name, outputs.get(name), ("batch", "tokens", _size(outputs, name))) for name in keys]
    return found


def _named(tensors: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    return next(tensor for tensor in tensors if tensor.name == name)


def _size(outputs: dict[str, tuple[int | str, ...]], name: str) -> int | str:
    """Size of an output's last axis, whatever it is; it must be fixed."""
    shape = outputs.get(name, ())
    return shape[-1] if shape and isinstance(shape[-1], int) else "a size"


class _Fields:
    """Typed access to the fields of one JSON object; every message names the field."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise BundleError(f"titans.json: {where} must be an object")
        self._content: dict[str, Any] = content
        self._where = where
        self._read: set[str] = set()

    def take(self, name: str, kind: type) -> Any:  # noqa: ANN401 - parsed JSON
        self._read.add(name)
        if name not in self._content:
            raise BundleError(f"titans.json: {self._where}: field {name!r} is missing")
        value = self._content[name]
        if type(value) is not kind:
            raise BundleError(f"titans.json: {self._where}: {name} must be of type {kind.__name__}")
        return value

    def optional(self, name: str) -> Any:  # noqa: ANN401 - parsed JSON
        self._read.add(name)
        return self._content.get(name)

    def integer(self, name: str, least: int, most: int = _LARGEST_INTEGER) -> int:
        value: int = self.take(name, int)
        if value < least:
            raise BundleError(f"titans.json: {self._where}: {name} is {value}; at least {least}")
        if value > most:
            raise BundleError(f"titans.json: {self._where}: {name} is {value}; at most {most}")
        return value

    def string(self, name: str) -> str:
        value: str = self.take(name, str)
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.string(name)
        if value not in choices:
            raise BundleError(f"titans.json: {self._where}: {name} is {value!r}; known: {', '.join(choices)}")
        return value

    def digest(self, name: str) -> str:
        value = self.string(name)
        if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise BundleError(f"titans.json: {self._where}: {name} is no SHA-256")
        return value

    def number(self, name: str) -> float:
        self._read.add(name)
        value: Any = self._content.get(name)
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise BundleError(
                f"titans.json: {self._where}: {name} must be a number of at most {_LARGEST:g} either way"
            )
        return float(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = self.take(name, dict)
        return value

    def array(self, name: str) -> list[Any]:
        value: list[Any] = self.take(name, list)
        return value

    def end(self) -> None:
        unknown = sorted(self._content.keys() - self._read)
        if unknown:
            raise BundleError(f"titans.json: {self._where}: unknown field {unknown[0]!r}")


def _requires(reader: _Fields) -> dict[str, Any]:
    fields = _Fields(reader.mapping("requires"), "requires")
    onnxruntime = fields.string("onnxruntime")
    content = {
        "onnxruntime": onnxruntime,
        "ir_version": fields.integer("ir_version", 1),
        "opset": fields.integer("opset", 1),
    }
    if not all(part.isdecimal() for part in onnxruntime.split(".")):
        raise BundleError(f"titans.json: requires: onnxruntime is {onnxruntime!r}; no version")
    fields.end()
    return content


def _tolerances(reader: _Fields) -> dict[str, float]:
    fields = _Fields(reader.mapping("tolerances"), "tolerances")
    content = {"atol": fields.number("atol"), "rtol": fields.number("rtol")}
    fields.end()
    return content


def _recommended(reader: _Fields) -> dict[str, Any]:
    fields = _Fields(reader.mapping("recommended"), "recommended")
    edit = fields.number("edit")
    if not 0 <= edit <= 1:
        raise BundleError(f"titans.json: recommended: edit is {edit}; it must lie between 0 and 1")
    editor = fields.optional("editor")
    if editor is not None and not isinstance(editor, dict):
        raise BundleError("titans.json: recommended: editor must be an object or null")
    fields.end()
    if editor is not None:
        try:
            Editor.from_dict(editor)
        except UsageError as error:
            raise BundleError(f"titans.json: recommended: {error}") from None
    return {"edit": edit, "editor": editor}


def _graph(value: object, where: str) -> GraphSpec:
    fields = _Fields(value, where)
    graph = GraphSpec(
        file=fields.string("file"),
        inputs=tuple(_tensor(item, f"{where}.inputs[{i}]") for i, item in enumerate(fields.array("inputs"))),
        outputs=tuple(
            _tensor(item, f"{where}.outputs[{i}]") for i, item in enumerate(fields.array("outputs"))
        ),
        formats=_formats(fields, where),
    )
    fields.end()
    return graph


def _formats(fields: _Fields, where: str) -> dict[str, str]:
    if fields.optional("formats") is None:
        return {}
    formats = _Fields(fields.mapping("formats"), f"{where}.formats")
    found = {kind: formats.string(kind) for kind in FORMATS if formats.optional(kind) is not None}
    formats.end()
    return found


def _tensor(value: object, where: str) -> TensorSpec:
    fields = _Fields(value, where)
    spec = TensorSpec(fields.string("name"), fields.choice("dtype", DTYPES), _shape(fields, where))
    fields.end()
    sizes = [axis if isinstance(axis, int) else _MOST.get(axis, 1) for axis in spec.shape]
    if math.prod(sizes) > _MAX_TENSOR:
        raise BundleError(f"titans.json: {where}: shape {list(spec.shape)} is beyond {_MAX_TENSOR} elements")
    return spec


def _state(value: object, where: str) -> StateSpec:
    fields = _Fields(value, where)
    spec = StateSpec(
        name=fields.string("name"),
        dtype=fields.choice("dtype", DTYPES),
        shape=_shape(fields, where),
        initial=_initial(fields),
        role=fields.choice("role", ROLES),
    )
    fields.end()
    if not spec.shape or spec.shape[0] != "batch" or len(spec.row_shape) != len(spec.shape) - 1:
        raise BundleError(f"titans.json: {where}: shape must be 'batch' followed by sizes")
    return spec


def _initial(fields: _Fields) -> float | str:
    if isinstance(fields.optional("initial"), str):
        return fields.choice("initial", (INITIAL_NAME,))
    return fields.number("initial")


def _shape(fields: _Fields, where: str) -> tuple[int | str, ...]:
    shape = fields.array("shape")
    for axis in shape:
        if not isinstance(axis, str) and (type(axis) is not int or not 0 <= axis <= _MAX_AXIS):
            raise BundleError(f"titans.json: {where}: shape {shape} must hold sizes and axis names")
    return tuple(shape)


def _file(value: object, where: str) -> FileEntry:
    fields = _Fields(value, where)
    entry = FileEntry(sha256=fields.digest("sha256"), size=fields.integer("size", 0))
    fields.end()
    return entry
