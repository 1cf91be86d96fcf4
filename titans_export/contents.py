"""What a bundle's manifest says of a model and its graphs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import onnx_ir as ir
import torch

from titans_converters.onnx.function import OPSET
from titans_converters.onnx.lowering import NATIVE_ONNXRUNTIME
from titans_converters.program import Axes, Program
from titans_export.exportable import Exportable
from titans_runtime import bundle as bundles

Twins: TypeAlias = dict[str, dict[str, str]]
"""Files by format, by graph."""
_IR_VERSION = 10
_LEAST_ONNXRUNTIME = "1.25"  # 1.24 refuses the operator's body; 1.25, 1.27 and 1.32 were tried


def manifest(
    model: Exportable,
    graphs: dict[str, bundles.GraphSpec],
    folder: Path,
    files: list[str],
    editing: dict[str, Any],
    weights: str,
    scan: str,
    tolerance: float,
) -> bundles.Manifest:
    """The manifest of a bundle whose files are written.

    Args:
        model: what was exported.
        graphs: by name, :func:`graph` and :func:`gradient_graph`.
        folder: of the bundle; ``files`` are hashed there.
        files: all but the manifest itself, relative to ``folder``.
        editing: what a session does unless it is told otherwise: ``{"edit", "editor"}``.
        weights: how matrices are stored.
        scan: what stands for the memory.
        tolerance: of the goldens, absolute and relative to an output's largest value.
    """
    facts = model.facts()
    onnxruntime = NATIVE_ONNXRUNTIME if scan == "native" else _LEAST_ONNXRUNTIME
    return bundles.Manifest.create(
        producer={
            name: version(name)
            for name in ("titans-export", "titans-converters", "torch", "onnx", "onnxscript")
        },
        requires={"onnxruntime": onnxruntime, "ir_version": _IR_VERSION, "opset": OPSET},
        model=facts.model | {"weights": weights, "scan": scan},
        tokenizer=facts.tokenizer,
        vocab_size=facts.vocab_size,
        edit_layers=facts.edit_layers,
        graphs=graphs,
        state=_state(model),
        tolerances={"atol": tolerance, "rtol": tolerance},
        recommended=editing,
        files={name: bundles.file_entry(folder / name) for name in files},
    )


def gradient_graph(name: str, model: ir.Model, twins: Twins) -> bundles.GraphSpec:
    """A gradient graph, which is known by what was written."""

    def tensors(values: Iterable[ir.Value]) -> tuple[bundles.TensorSpec, ...]:
        return tuple(
            bundles.TensorSpec(
                str(value.name),
                _ELEMENTS[value.dtype or ir.DataType.FLOAT],
                tuple(_axis(axis) for axis in value.shape or ()),
            )
            for value in values
        )

    return bundles.GraphSpec(
        f"{name}.onnx", tensors(model.graph.inputs), tensors(model.graph.outputs), _files(name, twins)
    )


def _files(name: str, twins: Twins) -> dict[str, str]:
    """A graph's file in every other format."""
    return {kind: files[name] for kind, files in twins.items()}


_ELEMENTS = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}


def _axis(axis: int | ir.SymbolicDim) -> int | str:
    return axis if isinstance(axis, int) else str(axis.value)


def graph(program: Program, twins: Twins) -> bundles.GraphSpec:
    """A program's graph."""

    def tensors(axes: dict[str, Axes]) -> tuple[bundles.TensorSpec, ...]:
        return tuple(
            bundles.TensorSpec(name, _dtype_name(program.dtype(name)), shape) for name, shape in axes.items()
        )

    return bundles.GraphSpec(
        f"{program.name}.onnx",
        tensors(program.input_axes),
        tensors(program.output_axes),
        _files(program.name, twins),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _state(model: Exportable) -> tuple[bundles.StateSpec, ...]:
    learned = model.learned_state()
    return tuple(
        bundles.StateSpec(
            name,
            _dtype_name(entry.dtype),
            ("batch", *entry.shape),
            bundles.INITIAL_NAME if name in learned else 0.0,
            entry.role,
        )
        for name, entry in model.state().items()
    )
