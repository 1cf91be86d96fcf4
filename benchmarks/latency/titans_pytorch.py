"""Against titans-pytorch: its own model with random weights, and what the import makes of these weights.

    .venv/bin/python -m benchmarks.latency.titans_pytorch memory --threads 1
    .venv/bin/python -m benchmarks.latency.titans_pytorch mac --threads 1

``memory`` is its ``NeuralMemory``, a prefill of 1,024 tokens and steps of one token. ``mac`` is its
``MemoryAsContextTransformer``: a prefill, and decoding after a prompt, with its cache and as its ``sample``
decodes by default, without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.latency.models import cached
from benchmarks.latency.results import publish
from titans_export.importers.titans_pytorch.checkpoint import import_checkpoint
from titans_export.pipeline import export_bundle
from titans_runtime.backends import Array
from titans_runtime.bench.measure import Case, Contestant, Measurement, measure
from titans_runtime.bench.peers import Job, Runner
from titans_runtime.bench.plot import to_png
from titans_runtime.bench.report import record, tables
from titans_runtime.progress import progress_bar

_VOCABULARY = 256
_PROMPT = 512
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "memory": {"dim": 256, "dim_head": 64, "heads": 4, "chunk_size": 64},
    "mac": {
        "num_tokens": _VOCABULARY,
        "dim": 256,
        "depth": 2,
        "segment_len": 64,
        "dim_head": 64,
        "heads": 4,
        "neural_memory_kwargs": {"dim_head": 64, "heads": 4},
    },
}
_TOLERANCE = 1e-4  # of the largest output


def library_model(kind: str) -> nn.Module:
    """The library's model with the weights that it begins with."""
    import titans_pytorch

    torch.manual_seed(0)
    make = titans_pytorch.NeuralMemory if kind == "memory" else titans_pytorch.MemoryAsContextTransformer
    model: nn.Module = make(**_ARGUMENTS[kind])
    return model.eval()


class Ours:
    """A session of the imported model; a memory takes vectors, which a table gives for the ids."""

    is_model = True

    def __init__(self, job: Job, table: Array | None, prompt: Array) -> None:
        """``prompt``: seen before every run."""
        self._model = tr.load(job.bundle, threads=job.threads)
        self._table, self._prompt = table, prompt
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}

    def start(self, batch: int, edit: float) -> None:
        """A new stream that has seen the prompt."""
        del batch
        self._session = self._model.session(edit=edit, editor=None)
        if len(self._prompt):
            self.append(self._prompt[None])

    def append(self, ids: Array) -> Array:
        """Outputs for vectors, logits for ids."""
        return self._session.append(ids[0] if self._table is None else self._table[ids[0]])[None]

    def close(self) -> None:
        """Let go of the model."""
        del self._model, self._session


class Theirs:
    """A function of the library's model and of whatever state it keeps."""

    is_model = True

    def __init__(self, job: Job, step: Callable[[Tensor, Any], tuple[Tensor, Any]], prompt: Array) -> None:
        """``step``: tokens and state to outputs and state, which begins as None."""
        import importlib.metadata

        torch.set_num_threads(job.threads)
        self._step, self._prompt = step, prompt
        self.versions: Mapping[str, str] = {
            "torch": torch.__version__,
            "titans-pytorch": importlib.metadata.version("titans-pytorch"),
        }
        self._state: Any = None

    @torch.no_grad()
    def start(self, batch: int, edit: float) -> None:
        """A new stream that has seen the prompt."""
        del batch, edit
        self._state = None
        if len(self._prompt):
            self.append(self._prompt[None])

    @torch.no_grad()
    def append(self, ids: Array) -> Array:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        outputs, self._state = self._step(torch.from_numpy(ids), self._state)
        array: Array = outputs.numpy()
        return array

    def close(self) -> None:
        """Let go of the state."""
        self._state = None


def memory_step(model: nn.Module, table: Tensor) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """The memory's own call with its own state."""

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:  # noqa: ANN401 - the library's
        outputs, state = model(table[ids], state=state)
        return outputs, state

    return step


def cached_step(model: nn.Module) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """What the library's ``sample`` calls with ``use_cache``: all tokens so far, and the cache."""

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:  # noqa: ANN401 - the library's
        seen, cache = (ids, None) if state is None else (torch.cat([state[0], ids], dim=1), state[1])
        logits, cache = model(seen, disable_flex_attn=True, cache=cache, return_cache=True)
        return logits[:, -ids.shape[1] :], (seen, cache)

    return step


def uncached_step(model: nn.Module) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """What it calls by default: all tokens so far, from the start."""

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:  # noqa: ANN401 - the library's
        seen = ids if state is None else torch.cat([state, ids], dim=1)
        logits = model(seen, disable_flex_attn=True)
        return logits[:, -ids.shape[1] :], seen

    return step


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(_ARGUMENTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = cached(f"titans-pytorch-{args.kind}", partial(_make, args.kind), "bundle")
    job = Job(folder / "bundle", None, args.threads, folder)
    model = library_model(args.kind)
    bar = partial(progress_bar, description="rounds", unit="round")
    measured = Measurement()
    for case, prompt, steps in _cases(args.kind, model):
        table = _table() if args.kind == "memory" else None
        contestants = [Contestant("onnxruntime", partial(_ours, table=table, prompt=prompt), job)]
        contestants += [
            Contestant(name, partial(_theirs, step=step, prompt=prompt), job) for name, step in steps.items()
        ]
        part = measure(contestants, [case], _VOCABULARY, args.rounds, _TOLERANCE, bar)
        measured.rows += part.rows
        measured.absent += part.absent
        measured.versions |= part.versions
    command = f"python -m benchmarks.latency.titans_pytorch {args.kind} --threads {args.threads}"
    content = record(measured, command)
    publish(f"titans_pytorch-{args.kind}-{args.threads}t", content, tables(content), to_png(content))


def _cases(kind: str, model: nn.Module) -> list[tuple[Case, Array, dict[str, Any]]]:
    """What is timed, after which prompt, and the library's ways to do it."""
    nothing = np.empty(0, np.int64)
    if kind == "memory":
        step = {"titans-pytorch": memory_step(model, torch.from_numpy(_table()))}
        return [(Case("prefill", 1024), nothing, step), (Case("decode", 64), nothing, step)]
    prompt = np.random.default_rng(1).integers(0, _VOCABULARY, _PROMPT)
    uncached = {"titans-pytorch": uncached_step(model)}
    return [
        (Case("prefill", 1024), nothing, uncached),
        (Case("decode", 64), prompt, {"titans-pytorch, cache": cached_step(model)}),
        (Case("decode", 6), prompt, {"titans-pytorch, sample's default": uncached_step(model)}),
    ]


def _ours(job: Job, table: Array | None, prompt: Array) -> Runner:
    return Ours(job, table, prompt)


def _theirs(job: Job, step: Callable[[Tensor, Any], tuple[Tensor, Any]], prompt: Array) -> Runner:
    return Theirs(job, step, prompt)


def _table() -> Array:
    """Vectors that stand for ids where a memory takes vectors."""
    table: Array = np.random.default_rng(2).standard_normal((_VOCABULARY, 256), np.float32)
    return table


def _make(kind: str, folder: Path) -> None:
    """Import and export the library's model."""
    folder.mkdir(parents=True)
    torch.save(library_model(kind).state_dict(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(_ARGUMENTS[kind]), encoding="utf-8")
    import_checkpoint(folder / "model.pt", folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")


if __name__ == "__main__":
    conclude(main)
