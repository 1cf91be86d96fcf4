"""A checkpoint: ``config.json`` and ``weights.safetensors`` in one folder, each written atomically."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from titans_export.config import ModelConfig
from titans_export.editing import EDITING_FILE
from titans_export.model import TitansModel
from titans_runtime.errors import DataError, UsageError
from titans_runtime.files import write_atomically
from titans_runtime.json_reader import canonical

CONFIG_FILE = "config.json"
TENSORS_FILE = "weights.safetensors"
PROGRESS_FILE = "training.safetensors"
SUMMARY_FILE = "training.json"
_CONFIG_KEY = "config"


def refuse_replacing(folder: Path, force: bool, resumes: bool = False) -> None:
    """Before any work: that a folder holds no checkpoint, unless it may be replaced.

    Args:
        folder: of the new checkpoint.
        force: it may.
        resumes: an unfinished training is gone on with, whatever lies beside it.

    Raises:
        UsageError: it holds one, or an unfinished training, or a file is in its place.
    """
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.exists() and not there.is_dir():
        raise UsageError(f"--out {folder}: {there} is a file; name a folder")
    if force or (resumes and (folder / PROGRESS_FILE).exists()):
        return
    for name in (CONFIG_FILE, TENSORS_FILE, PROGRESS_FILE):
        if (folder / name).exists():
            raise UsageError(
                f"--out {folder}: holds a checkpoint already ({name}); name another folder, "
                "or replace it with --force"
            )


def forget(folder: Path, *names: str) -> None:
    """Remove what says something of a checkpoint that another replaces, the files ``names`` among it."""
    for name in (SUMMARY_FILE, EDITING_FILE, *names):
        (folder / name).unlink(missing_ok=True)


def save_checkpoint(model: TitansModel, folder: Path) -> None:
    """Write the model's config and weights to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_weights(tensors, model.config.to_dict(), folder)
    write_json(folder / CONFIG_FILE, model.config.to_dict())


def save_weights(tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> None:
    """Write the weights, which name their config.

    So files of two models, left by a process that was killed between them, are told from a checkpoint.
    """
    write_atomically(folder / TENSORS_FILE, save_tensors(tensors, {_CONFIG_KEY: _digest(config)}))


def check_config(weights: Path, config: dict[str, Any]) -> None:
    """Whether weights were saved with a config, as far as they name one.

    Raises:
        DataError: they name another.
    """
    if read_metadata(weights).get(_CONFIG_KEY, _digest(config)) != _digest(config):
        raise DataError(
            f"{weights}: was saved with another {CONFIG_FILE} than the one beside it; "
            "a save was interrupted, or the config edited: train or import again"
        )


def load_checkpoint(folder: Path) -> TitansModel:
    """Read a checkpoint.

    Raises:
        DataError: a file is missing or damaged, or the weights do not fit the config.
    """
    config = ModelConfig.load(folder / CONFIG_FILE)
    tensors = read_tensors(folder / TENSORS_FILE)
    with torch.device("meta"):  # a wrong width must not cost its memory before it is noticed
        expected = TitansModel(config).state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            side = "missing from" if name not in tensors else "not expected in"
            raise DataError(f"{folder / TENSORS_FILE}: tensor {name!r} is {side} the file; check config.json")
        if tensors[name].shape != expected[name].shape:
            raise DataError(
                f"{folder / TENSORS_FILE}: {name} has shape {tuple(tensors[name].shape)}; "
                f"config.json asks for {tuple(expected[name].shape)}"
            )
    check_config(folder / TENSORS_FILE, config.to_dict())
    model = TitansModel(config)
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round every matrix of the weights to what float16 can hold; vectors keep their precision.

    Raises:
        DataError: a weight is too large for float16.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.half())
            if not torch.isfinite(parameter).all():
                raise DataError(f"{name}: a weight is larger than float16 holds; export float32 weights")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return load_tensors(path.read_bytes())
    except Exception as error:  # noqa: BLE001 - safetensors raises its own type, and plain OSError and ValueError
        raise DataError(f"{path}: no readable tensors ({error})") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that :func:`read_tensors` can read."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(config)).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
