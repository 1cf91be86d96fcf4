"""A file of titans-pytorch to a checkpoint of ours, and that checkpoint to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_export.importers.titans_pytorch.arguments import shown
from titans_export.importers.titans_pytorch.exportable import ImportedModel
from titans_export.importers.titans_pytorch.keys import (
    MEMORY,
    TRANSFORMER,
    LibraryModel,
    build_model,
    check_fit,
    load,
    recognised,
    unwrapped,
)
from titans_export.importers.titans_pytorch.options import (
    MemoryOptions,
    TransformerOptions,
    from_dict,
    to_dict,
)
from titans_export.importers.titans_pytorch.reading import finite, read_file
from titans_export.importers.titans_pytorch.versions import (
    assumptions,
    read_options,
    told_version,
    with_connections,
)
from titans_export.training.checkpoint import (
    CONFIG_FILE,
    PROGRESS_FILE,
    TENSORS_FILE,
    check_config,
    forget,
    read_tensors,
    refuse_replacing,
    save_weights,
    write_json,
)
from titans_runtime.errors import DataError, UsageError
from titans_runtime.json_reader import parse_object

LIBRARY = "titans-pytorch"
_EDITING = {"edit": 1.0, "editor": None}
_EDITING_FILE = "editing.json"
_BYTES = 256


@dataclass(frozen=True)
class Imported:
    """What an import has found.

    Attributes:
        kind: the library's class.
        tensors: in the file.
        parameters: numbers in the checkpoint.
        notes: a line for each thing that neither file tells, and that was taken for granted.
    """

    kind: str
    tensors: int
    parameters: int
    notes: tuple[str, ...] = ()


def import_checkpoint(
    file: Path,
    out: Path,
    config: Path | None = None,
    tokenizer: str | None = None,
    entry: str | None = None,
    force: bool = False,
) -> Imported:
    """Convert a state dict of titans-pytorch.

    Args:
        file: written by ``torch.save`` or by safetensors.
        out: folder of the checkpoint.
        config: the constructor's arguments as JSON; default is the file beside ``file`` of its name.
        tokenizer: ``bytes`` or ``ids`` for a transformer, default ``ids``; a memory takes vectors.
        entry: of a file that holds several things, the state dict: see :func:`~.reading.read_file`.
        force: replace the checkpoint that ``out`` holds.

    Raises:
        DataError: a file is missing or damaged, or its keys or shapes are not those of the arguments.
        UsageError: an argument cannot be represented, or does not fit, or ``out`` holds a checkpoint.
    """
    tensors = unwrapped(read_file(file, entry))
    path = config or file.with_suffix(".json")
    _refuse_overwriting(out, file, path)
    refuse_replacing(out, force)
    try:
        kind = recognised(tensors)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    arguments = _arguments(path)
    stated = arguments.pop("class", kind)
    if stated != kind:
        raise UsageError(f"{path}: class is {shown(stated)}, but {file} holds a {kind}")
    try:
        options, tensors, content, notes = _stated(kind, tensors, arguments)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    content["tokenizer"] = _tokenizer(options, tokenizer, "--tokenizer")
    try:
        check_fit(kind, options, tensors)
        model = build_model(kind, options)
        load(model, {name: finite(name, tensor) for name, tensor in tensors.items()})
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    forget(out, PROGRESS_FILE)
    save_imported(model, content, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Imported(kind, len(tensors), parameters, notes)


def _stated(
    kind: str, tensors: dict[str, Tensor], arguments: dict[str, Any]
) -> tuple[MemoryOptions | TransformerOptions, dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Options, tensors in the form of today, the checkpoint's config but for a tokenizer, and notes."""
    version = arguments.pop("version", None)
    connections = arguments.pop("hyper_connections", None) if kind == TRANSFORMER else None
    options = read_options(kind, arguments, version)
    _refuse_outside_weights(options)
    tensors = with_connections(tensors, connections)
    told = told_version(tensors)
    assumed = [] if version else assumptions(options, arguments, told)
    content = {
        "library": LIBRARY,
        "version": version or told,
        "hyper_connections": connections,
        "assumed": {name: value for name, value, _ in assumed},
        "class": kind,
        "options": to_dict(options),
    }
    return options, tensors, content, tuple(note for _, _, note in assumed)


def save_imported(model: LibraryModel, config: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint whose memories learn as they do in the library."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_weights(state, config, folder)
    write_json(folder / _EDITING_FILE, _EDITING)
    write_json(folder / CONFIG_FILE, config)


def load_imported(folder: Path, config: Mapping[str, Any]) -> ImportedModel:
    """The model of a checkpoint that :func:`import_checkpoint` has written.

    Raises:
        DataError: the config or the weights are damaged, or do not fit each other.
    """
    path = folder / CONFIG_FILE
    if config.get("library") != LIBRARY or config.get("class") not in (MEMORY, TRANSFORMER):
        raise DataError(
            f"{path}: library {config.get('library')!r} with class {config.get('class')!r} is unknown"
        )
    kind = str(config["class"])
    try:
        fields = dict(config["options"])
        options = (
            from_dict(MemoryOptions, fields) if kind == MEMORY else from_dict(TransformerOptions, fields)
        )
        _tokenizer(options, config.get("tokenizer"), "tokenizer")
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    model = _filled(kind, options, folder / TENSORS_FILE)
    check_config(folder / TENSORS_FILE, dict(config))
    return ImportedModel(model, dict(config))


def _filled(kind: str, options: MemoryOptions | TransformerOptions, path: Path) -> LibraryModel:
    tensors = read_tensors(path)
    with torch.device("meta"):  # a wrong width must not cost its memory before it is noticed
        expected = build_model(kind, options).state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            side = "missing from" if name not in tensors else "not expected in"
            raise DataError(f"{path}: tensor {name!r} is {side} the file; import it again")
        if tensors[name].shape != expected[name].shape:
            raise DataError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}; "
                f"config.json asks for {tuple(expected[name].shape)}"
            )
    model = build_model(kind, options)
    model.load_state_dict(tensors)
    return model


def _tokenizer(options: MemoryOptions | TransformerOptions, wanted: object, name: str) -> str:
    """What the model is given. ``name``: of where ``wanted`` is from, for a message."""
    if isinstance(options, MemoryOptions):
        if wanted not in (None, "vectors"):
            raise UsageError(f"{name} is {shown(wanted)}; a {MEMORY} takes vectors")
        return "vectors"
    if wanted not in (None, "ids", "bytes"):
        raise UsageError(f"{name} is {shown(wanted)}; a {TRANSFORMER} has 'ids' or 'bytes'")
    if wanted == "bytes" and options.num_tokens != _BYTES:
        raise UsageError(
            f"{name} is 'bytes', of which there are {_BYTES}; num_tokens is {options.num_tokens}"
        )
    return str(wanted or "ids")


def _refuse_outside_weights(options: MemoryOptions | TransformerOptions) -> None:
    if isinstance(options, MemoryOptions) and options.accept_weight_residual:
        raise UsageError(
            f"{MEMORY}: accept_weight_residual needs another memory's weights; import the "
            f"{TRANSFORMER} that both belong to"
        )


def _arguments(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes(), path.name)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); write the arguments that the model was built with "
            "as JSON there, or name their file with --config"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: must hold the constructor's arguments as a JSON object ({error})") from None


def _refuse_overwriting(out: Path, *sources: Path) -> None:
    """A checkpoint's files have names that the user's may have, too."""
    for source in sources:
        if source.parent.resolve() == out.resolve():
            raise UsageError(
                f"--out {out}: is the folder of {source.name}, which is imported and might be overwritten; "
                "name another"
            )
