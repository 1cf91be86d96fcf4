"""What the fields of a manifest must be to each other.

What it states twice is compared: a buffer of another size, or a tensor that nobody knows, would fail
within a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from titans_runtime.errors import BundleError
from titans_runtime.manifest.specs import IDS, INITIAL_NAME, VECTORS, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from titans_runtime.manifest.document import Manifest

Shape = tuple[int | str, ...]
Shapes = dict[str, Shape]

_MAX_STATE = 4 * 2**30  # bytes of one session
_READOUT = "gradient.readout"


def check_consistency(manifest: Manifest) -> None:
    """Everything but the identity.

    Raises:
        BundleError: two fields contradict each other.
    """
    if "model" not in manifest.graphs:
        raise BundleError("titans.json: graphs has no 'model'")
    _check_files(manifest)
    _check_state(manifest)
    _check_vocabulary(manifest)
    _check_model(manifest)
    if manifest.tokenizer == "bytes" and manifest.vocab_size > 256:
        raise BundleError(f"titans.json: vocab_size is {manifest.vocab_size}; a tokenizer of bytes has 256")
    for name in manifest.graphs:
        if name.startswith("gradient."):
            _check_gradient(manifest, name)


def _check_files(manifest: Manifest) -> None:
    for name, graph in manifest.graphs.items():
        for field, file in (("file", graph.file), *((f"formats.{k}", f) for k, f in graph.formats.items())):
            if file not in manifest.files:
                raise BundleError(f"titans.json: graphs.{name}.{field} {file!r} is not among the files")
        _check_lengths(name, graph, manifest)
    learned = any(entry.initial == INITIAL_NAME for entry in manifest.state)
    if learned and INITIAL_NAME not in manifest.files:
        raise BundleError(f"titans.json: state begins as in {INITIAL_NAME!r}, which is not among the files")


def _check_lengths(name: str, graph: GraphSpec, manifest: Manifest) -> None:
    """Whether every number of tokens can be cut into those that there are graphs for."""
    seen = set()
    for one in graph.lengths:
        if one.file not in manifest.files:
            raise BundleError(f"titans.json: graphs.{name}.lengths: {one.file!r} is not among the files")
        if (one.tokens, one.format) in seen:
            raise BundleError(f"titans.json: graphs.{name}.lengths: {one.tokens} of {one.format} stand twice")
        seen.add((one.tokens, one.format))
    for kind in {one.format for one in graph.lengths}:
        if graph.own_file(kind) is None:
            raise BundleError(
                f"titans.json: graphs.{name}.lengths: the graph has no file of its own in {kind}"
            )
        if not graph.takes_any_length(kind) and (1, kind) not in seen:
            raise BundleError(
                f"titans.json: graphs.{name}.lengths: {kind} has no graph of 1 token, to take what remains"
            )


def _check_state(manifest: Manifest) -> None:
    if manifest.state_bytes > _MAX_STATE:
        raise BundleError(
            f"titans.json: state takes {manifest.state_bytes} bytes a session; the limit is {_MAX_STATE}"
        )
    names = [entry.name for entry in manifest.state]
    if len(set(names)) != len(names):
        raise BundleError("titans.json: two state entries have the same name")


def _check_vocabulary(manifest: Manifest) -> None:
    """Whether there is a vocabulary, and of which size, as the tokenizer asks for."""
    tokenizer, size = manifest.tokenizer, manifest.vocab_size
    if (tokenizer == "vectors") != (size == 0):
        raise BundleError(f"titans.json: vocab_size is {size}, which the tokenizer {tokenizer!r} cannot have")


def _check_model(manifest: Manifest) -> None:
    graph = manifest.graphs["model"]
    inputs, outputs = _shapes(graph.inputs), _shapes(graph.outputs)
    if inputs.keys() != {_sequence(manifest), "edit", *_pasts(manifest)}:
        raise BundleError("titans.json: the inputs of graph 'model' do not follow from the state schema")
    expected: Shapes = {"edit": ("batch", manifest.edit_layers), **_pasts(manifest)}
    _check_shapes("model", inputs, expected)
    for name, found, wanted in _sequence_widths(manifest, inputs, outputs):
        _check_shapes("model", {name: found}, {name: wanted})


def _check_gradient(manifest: Manifest, name: str) -> None:
    """A graph that an editor calls: it gives it what the model has, and takes gradients of the state."""
    graph = manifest.graphs[name]
    inputs, outputs = _shapes(graph.inputs), _shapes(graph.outputs)
    model = _shapes(manifest.graphs["model"].inputs) | {"target_ids": ("batch", "tokens")}
    if name == _READOUT:
        keys = _shapes(manifest.graphs["model"].outputs)
        known = {"input_ids", "readout_key", "readout_rows", "base_logits", "past.readout"}
        wanted = {"logits", "loss", "grad.readout", "grad.readout_rows"}
        if inputs.keys() != known or outputs.keys() != wanted:
            raise BundleError(f"titans.json: graphs.{name}: has other inputs or outputs than this runtime's")
        model |= {key: shape for key, shape in keys.items() if key in known}
        _check_shapes(name, inputs, {key: shape for key, shape in model.items() if key in known})
        return
    unknown = sorted(inputs.keys() - model.keys())
    if unknown:
        raise BundleError(f"titans.json: graphs.{name}: the input {unknown[0]} is none of the model's")
    _check_shapes(name, inputs, {key: model[key] for key in inputs})
    _check_shapes(name, outputs, {"loss": ("batch",)})
    gradients = [output for output in outputs if output.startswith("grad.")]
    memories = {f"grad.{entry.name}": entry.shape for entry in manifest.state if entry.dtype == "float32"}
    for output in gradients:
        if output not in memories:
            raise BundleError(f"titans.json: graphs.{name}: {output} is the gradient of no state entry")
    _check_shapes(name, outputs, {output: memories[output] for output in gradients})
    for output, shape in outputs.items():
        if not {axis for axis in shape if isinstance(axis, str)} <= {"batch", "tokens"}:
            raise BundleError(f"titans.json: graphs.{name}: {output} has an axis of unknown size in {shape}")


def _check_shapes(graph: str, found: Mapping[str, Shape | None], expected: Shapes) -> None:
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise BundleError(
                f"titans.json: graphs.{graph}: {name} has shape {found.get(name)}; "
                f"the other fields ask for {shape}"
            )


def _shapes(tensors: Iterable[TensorSpec]) -> Shapes:
    return {tensor.name: tensor.shape for tensor in tensors}


def _pasts(manifest: Manifest) -> Shapes:
    return {f"past.{entry.name}": entry.shape for entry in manifest.state}


def _sequence(manifest: Manifest) -> str:
    return VECTORS if manifest.tokenizer == "vectors" else IDS


def _sequence_widths(
    manifest: Manifest, inputs: Shapes, outputs: Shapes
) -> list[tuple[str, Shape | None, Shape]]:
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


def _size(outputs: Shapes, name: str) -> int | str:
    """Size of an output's last axis, whatever it is; it must be fixed."""
    shape = outputs.get(name, ())
    return shape[-1] if shape and isinstance(shape[-1], int) else "a size"
