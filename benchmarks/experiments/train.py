"""One recipe for all: AdamW, warm-up, cosine, a curriculum of lengths; resumable after a kill."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional as F

from benchmarks.experiments.contestants import CONTESTANTS
from benchmarks.experiments.contestants.network import Network, State
from benchmarks.experiments.contestants.titans import Titans
from benchmarks.experiments.tasks.task import IGNORED, Batch, Task
from titans_export.training.checkpoint import read_metadata, read_tensors, save_checkpoint
from titans_runtime.errors import DataError
from titans_runtime.files import write_atomically
from titans_runtime.progress import progress_bar

STATE = "training.safetensors"
CHECKPOINT = "checkpoint"
"""Folder of a finished Titans model, to export."""
_SAVE_EVERY = 100
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of mallopt(3)


@dataclass(frozen=True)
class Recipe:
    """How everybody is trained.

    Attributes:
        steps: of the optimizer.
        learning_rate: its peak.
        weight_decay: of the weights of products.
        warm_up: share of the steps.
        clip: norm of the gradient.
    """

    steps: int
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warm_up: float = 0.05
    clip: float = 1.0


class Training:
    """One contestant on one task with one seed: network, optimizer, step, and the state rows go on from."""

    def __init__(self, task: Task, contestant: str, seed: int, recipe: Recipe) -> None:
        """Weights follow from the seed."""
        self.task, self.contestant, self.seed, self.recipe = task, contestant, seed, recipe
        torch.manual_seed(seed)
        self.network: Network = CONTESTANTS[contestant].build(task.vocab_size)
        self.optimizer = _optimizer(self.network, recipe)
        self.state = self.network.initial_state(task.batch)
        self.step = 0
        self.loss = math.nan

    def run(self, folder: Path) -> Network:
        """Train what is still to be trained; the state is kept in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.resume(folder / STATE)
        remaining = range(self.step, self.recipe.steps)
        label = f"{self.task.name}, {self.contestant}, seed {self.seed}"
        _keep_freed_memory()
        with _denormals_flushed():
            for step in progress_bar(remaining, label, "step"):
                self.advance(step)
                if self.step % _SAVE_EVERY == 0 or self.step == self.recipe.steps:
                    self.save(folder / STATE)
        self.network.eval()
        self.network.set_noise(0.0)
        if isinstance(self.network, Titans):
            save_checkpoint(self.network.model, folder / CHECKPOINT)
        return self.network

    def advance(self, step: int) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self._schedule(step)
        self.network.set_noise(step / self.recipe.steps)
        torch.manual_seed(step + (self.seed << 32))  # a resumed training draws what an unbroken one draws
        batch = self.task.training_batch(self.seed, step, self.recipe.steps)
        loss, present = answer_loss(self.network, batch, self.state)
        self.loss = float(loss.detach())
        if not math.isfinite(self.loss):
            raise DataError(
                f"{self.task.name}, {self.contestant}, seed {self.seed}: not finite at step {step}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = self._carried(present, step)
        self.step = step + 1

    def _carried(self, present: State, step: int) -> State:
        """What the next batch's rows begin with: what their row of this batch left, or nothing."""
        chance = np.random.default_rng([self.seed, step, 1]).random(self.task.batch)
        goes_on = torch.from_numpy(chance < self.task.carry)
        initial = self.network.initial_state(self.task.batch)
        return {
            name: torch.where(goes_on.view(-1, *[1] * (past.ndim - 1)), past.detach(), initial[name])
            for name, past in present.items()
        }

    def _schedule(self, step: int) -> float:
        warm_up = max(1, round(self.recipe.warm_up * self.recipe.steps))
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.recipe.steps - warm_up)
        return 0.5 * (1 + math.cos(math.pi * done))

    def save(self, path: Path) -> None:
        """Everything that the next step depends on, without pickle."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"state.{name}": tensor for name, tensor in self.state.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        identity = self._identity() | {"step": self.step, "loss": self.loss}
        write_atomically(path, save_tensors(contiguous, {"training": json.dumps(identity)}))

    def resume(self, path: Path) -> None:
        """Take up a saved state, if there is one.

        Raises:
            DataError: it is damaged, or was saved by a training with other settings.
        """
        if not path.exists():
            return
        tensors = read_tensors(path)
        saved = json.loads(read_metadata(path).get("training", "{}"))
        if any(saved.get(name) != value for name, value in self._identity().items()):
            raise DataError(f"{path}: belongs to another training; remove it, or give another --out")
        self.network.load_state_dict(_part(tensors, "network."))
        self.state = _part(tensors, "state.")
        content = self.optimizer.state_dict()
        for name, tensor in _part(tensors, "optimizer.").items():
            index, slot = name.split(".")
            content["state"].setdefault(int(index), {})[slot] = tensor
        self.optimizer.load_state_dict(content)
        self.step, self.loss = saved["step"], saved["loss"]

    def _identity(self) -> dict[str, Any]:
        shapes = [list(parameter.shape) for parameter in self.network.parameters()]
        return {
            "task": self.task.name,
            "contestant": self.contestant,
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "carry": self.task.carry,
            "curriculum": list(self.task.curriculum),
            "shapes": shapes,
        }


def answer_loss(network: Network, batch: Batch, state: State) -> tuple[Tensor, State]:
    """Mean cross-entropy of the answers that are asked for, and the state after the batch."""
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    asked = targets != IGNORED
    features, present = network(tokens, state)
    return F.cross_entropy(network.head(features[asked]), targets[asked]), present


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Gradients that fade over hundreds of tokens end as denormals, which make products ten times slower.

    Of this thread, and of those that it starts meanwhile.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _keep_freed_memory() -> None:
    """Have glibc reuse what is freed: given back to the system, every page of it is cleared anew.

    A fifth of a step that holds 84 MB of states a layer. Of the whole process; other C libraries are left
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; only the weights of products decay."""
    products = {module.weight for module in network.modules() if isinstance(module, torch.nn.Linear)}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p in products], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p not in products], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
