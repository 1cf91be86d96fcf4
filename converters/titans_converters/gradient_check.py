"""One comparison of a graph of gradients with autograd, over what its graph was traced from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from titans_converters.program import Program
from titans_runtime.quiet import quiet

_TOLERANCE = 1e-2
"""Of a gradient's largest number. A path that was cut or invented is a matter of 1; rounding, of 1e-5."""

_DRAWS = 2

Arrays = Mapping[str, np.ndarray[Any, Any]]


def check_gradient(proto: onnx.ModelProto, program: Program) -> None:
    """Refuse a graph whose gradients are not autograd's.

    Args:
        proto: takes ``past.<memory>`` and tokens; gives ``loss (B,)`` and ``grad.<memory>``.
        program: its module gives the loss; the inputs are as the graph's.

    Raises:
        ValueError: they differ at every draw of random inputs; the message names the first.
    """
    if any(node.op_type.startswith("Random") or node.op_type == "Bernoulli" for node in proto.graph.node):
        return  # two runs are not alike
    evaluator = ReferenceEvaluator(proto)
    wrong = None
    for seed in range(_DRAWS):  # a draw may lie where a gradient jumps, by rounding on the other side
        inputs = _drawn(program, seed)
        expected = _of_autograd(program, inputs)
        found = None if expected is None else _of_graph(evaluator, inputs)
        wrong = None if expected is None or found is None else _differing(found, expected)
        if wrong is None:
            return
    raise ValueError(
        f"gradient: {wrong} is not what autograd gives; the loss changes a tensor in place, or holds a "
        "derivative of its own, which the graph cannot tell"
    )


def _drawn(program: Program, seed: int) -> dict[str, Tensor]:
    """Normal numbers; weights so small that what they multiply keeps its size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, example in program.inputs.items():
        fan = example.shape[1] if name.startswith("past.") and example.dim() > 1 else 1
        drawn[name] = torch.randn(example.shape, generator=generator) / max(fan, 1) ** 0.5
    return drawn


def _of_autograd(program: Program, inputs: Mapping[str, Tensor]) -> Arrays | None:
    """Loss and gradients, or None where autograd has none that are finite."""
    leaves = {name: x.clone().requires_grad_(name.startswith("past.")) for name, x in inputs.items()}
    pasts = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    try:
        with quiet(), torch.enable_grad():
            (loss,) = program.module(*leaves.values())
            found: Sequence[Tensor | None] = torch.autograd.grad(
                loss.sum(), list(pasts.values()), allow_unused=True
            )
    except RuntimeError:  # it cannot differentiate the loss, or nothing in it can be
        return None
    given = {"loss": loss.detach()} | {
        name.replace("past.", "grad.", 1): torch.zeros_like(leaf) if own is None else own
        for (name, leaf), own in zip(pasts.items(), found, strict=True)
    }
    return {name: own.numpy() for name, own in given.items()} if _finite(given.values()) else None


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _of_graph(evaluator: ReferenceEvaluator, inputs: Mapping[str, Tensor]) -> Arrays | None:
    """Loss and gradients, or None where ONNX's evaluator lacks an operator or a form of one."""
    taken = {name: x.numpy() for name, x in inputs.items() if name in evaluator.input_names}
    try:
        with np.errstate(all="ignore"):
            found = evaluator.run(None, taken)
    except Exception:  # noqa: BLE001 - it raises anything; what it cannot run is not what is wrong
        return None
    return dict(zip(evaluator.output_names, found, strict=True))


def _differing(found: Arrays, expected: Arrays) -> str | None:
    """Name of the first array that is another."""
    for name, own in expected.items():
        error = np.abs(found[name] - own).max(initial=0)
        if not error <= _TOLERANCE * np.abs(own).max(initial=0) + 1e-6:
            return name
    return None
