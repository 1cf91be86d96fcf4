"""``naive``: the export that one gets without this project's, run as one would.

The rule is PyTorch's ``scan`` over tokens, which ``torch.onnx.export`` turns into an ONNX ``Scan``. Nothing
is grouped, tiled or bound, and the state travels through NumPy at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans_export.memory.output import MemoryOutput
from titans_export.model import Rules, TitansModel, initial_state
from titans_export.peers.eager import open_model, with_rules
from titans_export.peers.flat import FlatModel, Tensors
from titans_export.recurrence import Core
from titans_runtime.backends import Array, Arrays
from titans_runtime.bench.peers import Job
from titans_runtime.forward import SEGMENT
from titans_runtime.quiet import quiet

_BATCH = 1  # PyTorch's scan does not export with a free one
_TOKENS = 37  # unlike any fixed size


class NaiveRunner:
    """A graph with named inputs and outputs in a plain ``onnxruntime.InferenceSession``."""

    is_model = True

    def __init__(self, path: Path, model: TitansModel, threads: int) -> None:
        """Load the file at ``path``, which :func:`export` wrote for ``model``."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._taken = {value.name for value in self._session.get_inputs()}
        self._model = model
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}
        self._feeds: Arrays = {}

    def start(self, batch: int, edit: float) -> None:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        state = {f"past.{name}": x.numpy() for name, x in self._model.initial_state(batch).items()}
        state["edit"] = np.full((batch, self._model.config.layers), edit, np.float32)
        self._feeds = {name: array for name, array in state.items() if name in self._taken}

    def append(self, ids: Array) -> Array:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        parts = []
        for start in range(0, ids.shape[1], SEGMENT):
            self._feeds["input_ids"] = ids[:, start : start + SEGMENT]
            results = dict(zip(self._outputs, self._session.run(None, self._feeds), strict=True))
            parts.append(results.pop("logits"))
            self._feeds |= {f"past.{name.removeprefix('present.')}": x for name, x in results.items()}
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def close(self) -> None:
        """Let go of the session."""
        del self._session
        self._feeds = {}


def load(job: Job) -> NaiveRunner:
    """Export once into the job's folder, and load."""
    model = open_model(job)
    path = job.work / "naive" / "model.onnx"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        export(model, path)
    return NaiveRunner(path, model, job.threads)


def export(model: TitansModel, path: Path) -> None:
    """``torch.onnx.export`` of the model with its memory as a scan over tokens."""
    rules = Rules(exact=_scan_rule, recurrence=_scan_core)
    flat = FlatModel(with_rules(model, rules)).eval()
    state = initial_state(model.config, _BATCH)
    arguments = (
        torch.zeros(_BATCH, _TOKENS, dtype=torch.int64),
        torch.zeros(_BATCH, model.config.layers),
        *(state[name] for name in flat.taken),
    )
    shapes: tuple[Any, ...] = ({1: torch.export.Dim("tokens")}, {}, ({},) * len(flat.taken))
    with quiet():
        torch.onnx.export(
            flat,
            arguments,
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "edit", *(f"past.{name}" for name in flat.taken)],
            output_names=["logits", *(f"present.{name}" for name in flat.given)],
            external_data=True,
            verbose=False,
        )


def _scan_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    edit: Tensor,
    past_memory: Tensor,
    past_momentum: Tensor,
    *,
    tile: int,
) -> MemoryOutput:
    """:func:`titans_export.memory.token_loop` as a scan."""
    del tile

    def one(carry: Tensors, token: Tensors) -> tuple[Tensors, Tensor]:
        memory, momentum, strength = carry
        q, k, v, log_a, log_eta, theta = token
        error = v - strength * torch.einsum("bhkv,bhk->bhv", memory, k)
        write = theta[..., None, None] * k[..., :, None] * error[..., None, :]
        momentum = log_eta.exp()[..., None, None] * momentum + write
        memory = log_a.exp()[..., None, None] * memory + momentum
        output = torch.einsum("bhkv,bhk->bhv", memory, q)
        return (memory, momentum, strength.clone()), output

    tokens = tuple(x.movedim(2, 0) for x in (query, key, value, log_retention, log_momentum, step))
    carry = (past_memory, past_momentum, edit[:, None, None].expand(-1, *value.shape[1:2], 1).clone())
    (memory, momentum, _), outputs = _scan(one, carry, tokens)
    return outputs.movedim(0, 2), memory, momentum


def _scan_core(
    core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
) -> tuple[Tensor, Tensors]:
    """:func:`titans_export.recurrence.run_core`, one token after the other, as a scan."""
    count = len(carry)

    def one(state: Tensors, token: Tensors) -> tuple[Tensors, Tensor]:
        at, *rest = state
        past, fixed = tuple(rest[:count]), tuple(rest[count:])
        lifted = tuple(x[:, :, None] for x in token)
        output, present = core.one(lifted, at % core.tile, past, fixed)
        return (at + 1, *present, *(x.clone() for x in fixed)), output[:, :, 0]

    state = (position, *carry, *shared)
    (_, *rest), outputs = _scan(one, state, tuple(x.movedim(2, 0) for x in tokens))
    return outputs.movedim(0, 2), tuple(rest[:count])


def _scan(
    one: Callable[[Tensors, Tensors], tuple[Tensors, Tensor]], carry: Tensors, tokens: Tensors
) -> tuple[Tensors, Tensor]:
    from torch._higher_order_ops.scan import scan

    result: tuple[Tensors, Tensor] = scan(one, carry, tokens)
    return result
