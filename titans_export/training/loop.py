"""The training loop: segments of a stream, state carried from segment to segment, resumable."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional as F

from titans_export.config import ModelConfig
from titans_export.memory import MemoryOutput, neural_memory
from titans_export.model import Rules, State, TitansModel
from titans_export.recurrence import Core, Tensors, run_core
from titans_export.training.checkpoint import (
    PROGRESS_FILE,
    SUMMARY_FILE,
    forget,
    read_metadata,
    read_tensors,
    save_checkpoint,
    write_json,
)
from titans_export.training.data import Corpus, SegmentStream, Source
from titans_export.training.evaluate import bits_per_byte
from titans_export.training.whitening import measure_whitening
from titans_runtime.errors import DataError
from titans_runtime.files import write_atomically
from titans_runtime.json_reader import parse_object

_RESET_CHANCE = 1 / 16  # of a reader's state, each step: every file begins with an empty memory
_VALIDATION_BYTES = 8192  # of each development file, while training


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        edit: strength ``λ`` while training: 0 trains a plain gated state-space model, 1 the paper's way.
        steps: optimizer steps.
        batch: readers side by side.
        segment: tokens a reader takes each step; gradients reach back that far.
        learning_rate: peak rate, after a linear warm-up and before a linear decay to zero.
        weight_decay: decoupled, on matrices.
        seed: of the weights and of the data order.
        save_every: steps between saved states.
        validate_every: steps between validations.
        mixed_precision: products in bfloat16; the memory rule stays in float32.
        compiled: run the layers through ``torch.compile`` (needs a C++ compiler).
    """

    edit: float = 0.0
    steps: int = 4000
    batch: int = 8
    segment: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    save_every: int = 100
    validate_every: int = 500
    mixed_precision: bool = True
    compiled: bool = False


Progress = Callable[[Iterable[int]], Iterable[int]]
Report = Callable[[str], None]


def train(
    model_config: ModelConfig,
    config: TrainingConfig,
    corpus: Corpus,
    folder: Path,
    command: str,
    progress: Progress = lambda steps: steps,
    report: Report = lambda _: None,
) -> TitansModel:
    """Train a model, or go on where a killed training left off, and write its checkpoint.

    Args:
        model_config: architecture.
        config: how to train; a saved state of another one is refused.
        corpus: text by split.
        folder: where the checkpoint, and the state to resume from, are written.
        command: recorded in the summary.
        progress: wraps the remaining steps, to draw a bar.
        report: receives one line per validation.

    Returns:
        The trained model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model_config, config, corpus)
    trainer.resume(folder / PROGRESS_FILE)
    for step in progress(range(trainer.step, config.steps)):
        trainer.advance(step)
        if trainer.step % config.save_every == 0:
            trainer.save(folder / PROGRESS_FILE)
        if trainer.step % config.validate_every == 0:
            report(f"step {trainer.step}: development {trainer.validate():.4f} bits per byte")
    model = trainer.model.eval()
    measure_whitening(model, corpus.train, config.edit, seed=config.seed)
    forget(folder)
    save_checkpoint(model, folder)
    write_json(folder / SUMMARY_FILE, _summary(trainer, corpus, command))
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    return model


class Trainer:
    """Weights, optimizers and carried state between two steps."""

    def __init__(self, model_config: ModelConfig, config: TrainingConfig, corpus: Corpus) -> None:
        """Begin at step 0 with weights drawn from ``config.seed``."""
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, corpus
        self.model = TitansModel(model_config, Rules(_float32_rule, _float32_recurrence))
        self.stream = SegmentStream(corpus.train, config.batch, config.segment, config.seed)
        self.optimizers = _optimizers(self.model, config)
        self.edit = torch.full((config.batch, model_config.layers), config.edit)
        self.state = self._zero_state()
        self.step = 0
        self.seconds = 0.0
        self._features = torch.compile(self.model.features) if config.compiled else self.model.features

    def advance(self, step: int) -> None:
        """One optimizer step on the stream's segment ``step``."""
        began = time.perf_counter()
        inputs, targets = self.stream.at(step)
        self._reset_some_rows(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.mixed_precision):
            features, present = self._features(inputs, self.edit, self.state)
            logits = self.model.head(features)
        loss = F.cross_entropy(logits.float().transpose(1, 2), targets)
        if not math.isfinite(float(loss.detach())):
            raise DataError(f"step {step}: the loss is not finite; train with a smaller --learning-rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * self._schedule(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state = {name: tensor.detach().to(self.state[name].dtype) for name, tensor in present.items()}
        self.step = step + 1
        self.seconds += time.perf_counter() - began

    def validate(self) -> float:
        """Bits per byte on the development files."""
        return bits_per_byte(self.model, self.corpus.development, self.config.edit, _VALIDATION_BYTES)

    def save(self, path: Path) -> None:
        """Everything that the next step depends on, without pickle."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"state.{name}": tensor for name, tensor in self.state.items()}
        for index, optimizer in enumerate(self.optimizers):
            for parameter, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    tensors[f"optimizer.{index}.{parameter}.{slot}"] = torch.as_tensor(value)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, save_tensors(contiguous, {"training": json.dumps(self._identity())}))

    def resume(self, path: Path) -> None:
        """Take up a saved state, if there is one.

        Raises:
            DataError: it was saved by a training with other settings.
        """
        if not path.exists():
            return
        tensors = read_tensors(path)
        saved = _metadata(path)
        expected = self._identity()
        for name in ("model", "training", "corpus"):
            if saved.get(name) != expected[name]:
                raise DataError(
                    f"{path}: belongs to a training with another {name} setting; remove it or change --out"
                )
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.model.load_state_dict(_part(tensors, "model."))
        self.state = _part(tensors, "state.")
        for index, optimizer in enumerate(self.optimizers):
            content = optimizer.state_dict()
            for name, tensor in _part(tensors, f"optimizer.{index}.").items():
                parameter, slot = name.split(".")
                content["state"].setdefault(int(parameter), {})[slot] = tensor
            optimizer.load_state_dict(content)

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "training": dataclasses.asdict(self.config),
            "corpus": sum(len(source.data) for source in self.corpus.train),
            "step": self.step,
            "seconds": self.seconds,
        }

    def _zero_state(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self._initial_state().items()}

    def _initial_state(self) -> State:
        state = self.model.initial_state(self.config.batch)
        return {name: tensor for name, tensor in state.items() if name not in ("context", "readout")}

    def _reset_some_rows(self, step: int) -> None:
        draw = np.random.default_rng([self.config.seed, 1, step]).random(self.config.batch)
        keep = torch.from_numpy(draw >= _RESET_CHANCE)
        fresh = self._initial_state()  # not detached: this is where learned memories learn
        self.state = {
            name: torch.where(keep.view(-1, *[1] * (tensor.dim() - 1)), tensor, fresh[name])
            for name, tensor in self.state.items()
        }

    def _schedule(self, step: int) -> float:
        """Warm-up over 2 % of the steps, a plateau, linear decay over the last half."""
        warm_up = max(1, self.config.steps // 50)
        decay = max(1, self.config.steps // 2)
        return min(1.0, (step + 1) / warm_up, (self.config.steps - step) / decay)


def _float32_rule(*inputs: Tensor, tile: int) -> MemoryOutput:
    """The memory rule outside mixed precision: products of gates lose too much in bfloat16."""
    with torch.autocast("cpu", enabled=False):
        q, k, v, log_a, log_eta, step, edit, memory, momentum = (tensor.float() for tensor in inputs)
        return neural_memory(q, k, v, log_a, log_eta, step, edit, memory, momentum, tile=tile)


def _float32_recurrence(
    core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
) -> tuple[Tensor, Tensors]:
    """Likewise."""
    with torch.autocast("cpu", enabled=False):
        tokens, carry, shared = (tuple(x.float() for x in part) for part in (tokens, carry, shared))
        return run_core(core, position, tokens, carry, shared)


def _optimizers(model: TitansModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest."""
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and name.startswith("blocks.")
        (hidden if matrix and not name.endswith(("gates.weight", "convolution.weight")) else rest).append(
            parameter
        )
    return [
        torch.optim.Muon(
            hidden,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _summary(trainer: Trainer, corpus: Corpus, command: str) -> dict[str, Any]:
    config = trainer.config

    def names(sources: list[Source]) -> list[str]:
        return [source.name for source in sources]

    return {
        "command": command,
        "training": dataclasses.asdict(config),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "training_bytes": sum(len(source.data) for source in corpus.train),
        "seconds": round(trainer.seconds),
        "bits_per_byte": {
            "edit": config.edit,
            "development": round(bits_per_byte(trainer.model, corpus.development, config.edit), 4),
            "held_out": round(bits_per_byte(trainer.model, corpus.held_out, config.edit), 4),
        },
        "development_files": names(corpus.development),
        "held_out_files": names(corpus.held_out),
    }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _metadata(path: Path) -> dict[str, Any]:
    metadata = read_metadata(path)
    if "training" not in metadata:
        raise DataError(f"{path}: no state of a training; remove it or change --out")
    try:
        return parse_object(metadata["training"].encode(), path.name)
    except ValueError:
        raise DataError(f"{path}: no state of a training; remove it or change --out") from None
