"""A file with a state dict of titans-pytorch: which of what it holds, and whether it is numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from titans_export.importers.titans_pytorch.arguments import shown, shown_key
from titans_export.importers.titans_pytorch.keys import has_model, prefix_of_model, unwrapped
from titans_export.training.checkpoint import read_metadata, read_tensors
from titans_runtime.errors import DataError, UsageError
from titans_runtime.quiet import quiet

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FEW, _LEVELS = 5, 3
_CODE = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")


def read_file(file: Path, entry: str | None) -> dict[str, Tensor]:
    """The state dict in a file, as it is there.

    Args:
        file: written by ``torch.save`` or by safetensors.
        entry: its name; one within another after a dot. Where no entry has the rest of the name, it is
            what stands before the keys, up to a dot.

    Raises:
        DataError: the file is missing or damaged, or holds other things than a state dict of numbers.
        UsageError: it has no such entry.
    """
    content: object = _safetensors(file) if _is_safetensors(file) else _unpickled(file)
    if entry is not None:
        content = _chosen(content, entry, file)
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"{file}: holds no state dict; save model.state_dict()")
    _refuse_several(content, entry, file)
    names = {str(name): tensor for name, tensor in content.items()}
    for name, tensor in names.items():
        _refuse_form(file, shown_key(name), tensor)
    return names


def _chosen(content: object, entry: str, file: Path) -> object:
    rest, within = entry, content
    while isinstance(within, Mapping) and rest not in within:
        inner = (name for name, value in within.items() if isinstance(value, Mapping))
        outer = next((name for name in inner if rest.startswith(f"{name}.")), None)
        if outer is None:
            prefixed = {
                str(name): value for name, value in within.items() if str(name).startswith(f"{rest}.")
            }
            if not prefixed:
                break
            return {name.removeprefix(f"{rest}."): value for name, value in prefixed.items()}
        rest, within = rest.removeprefix(f"{outer}."), within[outer]
    if not isinstance(within, Mapping) or rest not in within:
        raise UsageError(f"--entry {shown_key(entry)}: {file} holds {_listed(content)}")
    return within[rest]


def _listed(content: object) -> str:
    """A few names, of what may be a state dict's thousands."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    few = ", ".join(shown_key(str(name)) for name in list(content)[:_FEW])
    return few + (", …" if len(content) > _FEW else "")


def _refuse_several(content: Mapping[object, object], entry: str | None, file: Path) -> None:
    """A state dict has a model's keys, and nothing else."""
    held = next(_models(content, entry or ""), None)
    hint = "" if held in (None, entry or "") else f", or name what holds it: --entry {shown_key(str(held))}"
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{file}: {shown(str(name))} is no tensor; save model.state_dict(){hint}")
    if hint:
        raise DataError(f"{file}: the model is a part of what it holds; save model.state_dict(){hint}")


def _models(content: Mapping[object, object], path: str, levels: int = _LEVELS) -> Iterator[str]:
    """Entries that hold a model's keys, by the names that :func:`read_file` takes."""
    before = f"{path}." if path else ""
    names = [str(name) for name, value in content.items() if isinstance(value, Tensor)]
    prefix = prefix_of_model(names)
    if has_model(unwrapped(dict.fromkeys(names))):
        yield path
    elif prefix is not None:
        yield before + prefix
    for name, value in content.items():
        if isinstance(value, Mapping) and levels:
            yield from _models(value, f"{before}{name}", levels - 1)


def _is_safetensors(file: Path) -> bool:
    """By its content: a name may have any ending."""
    try:
        with file.open("rb") as opened:
            head = opened.read(9)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= file.stat().st_size


def _safetensors(file: Path) -> dict[str, Tensor]:
    """Of several names for one tensor, ``safetensors.torch.save_model`` keeps one and notes the others."""
    tensors = read_tensors(file)
    for name, kept in read_metadata(file).items():
        if kept in tensors:
            tensors.setdefault(name, tensors[kept])
    return tensors


def _unpickled(file: Path) -> object:
    """By ``torch.load`` with nothing but tensors allowed."""
    try:
        opened = file.open("rb")  # given a name, torch would go by its ending
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        with quiet(), opened:
            return torch.load(opened, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - what a damaged pickle raises is anything
        raise DataError(
            f"{file}: no file of tensors ({_reason(error)}); save model.state_dict() with torch.save, or "
            "safetensors"
        ) from None


def _reason(error: Exception) -> str:
    """Why a file was not read; never torch's advice, which is to run what the file holds."""
    text = str(error)
    first = text.strip().split("\n", maxsplit=1)[0]
    if code := _CODE.search(text):
        return f"it holds {shown_key(code[1])}, which is more than tensors"
    if "TorchScript archive" in text:
        return "a TorchScript archive"
    if ".tar format" in text:
        return "of PyTorch's old .tar format, or damaged"
    if "eights only" in text or "weights_only" in text:
        return "damaged, or it holds more than tensors"
    # A seek beyond the end of a file that was cut is the system's error, and an empty file has no words.
    cut = isinstance(error, OSError) or "zip archive" in first or not first
    return "damaged or truncated" if cut else first


def _refuse_form(file: Path, name: str, tensor: Tensor) -> None:
    """What is no dense tensor of floating-point numbers, with numbers in it."""
    if tensor.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise DataError(
            f"{file}: {name} is of type {tensor.dtype}; expected floating-point numbers, of {known}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise DataError(f"{file}: {name} is a sparse or nested tensor; save a dense one")
    if tensor.is_meta:
        raise DataError(f"{file}: {name} has a shape but no numbers (device meta); save the trained model")


def finite(name: str, tensor: Tensor) -> Tensor:
    """In float32.

    Raises:
        DataError: a value is not finite there.
    """
    converted = tensor.float()
    if not torch.isfinite(converted).all():
        held = "too large for float32" if torch.isfinite(tensor).all() else "that are not finite"
        raise DataError(f"{name} holds values {held}")
    return converted
