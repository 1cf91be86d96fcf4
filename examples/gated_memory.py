"""A memory of your own, edited without PyTorch: a gated MLP, exported and taught pairs of vectors.

    .venv/bin/python examples/gated_memory.py

The memory is three methods. Its loss is traced and differentiated, and the graph is then run in ONNX Runtime,
with an optimizer of the runtime: what a server would do, where no PyTorch is installed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_converters.memory import memory_answer, memory_gradient
from titans_runtime.optimizers import Adam, Step

WIDTH, INNER = 16, 32


class GatedMemory:
    """``f(x) = x + (silu(x U) ∘ (x V)) W``."""

    parameters: Mapping[str, tuple[int, ...]] = {
        "up": (WIDTH, INNER),
        "gate": (WIDTH, INNER),
        "down": (INNER, WIDTH),
    }

    def forward(self, weights: Mapping[str, Tensor], query: Tensor) -> Tensor:
        """Answer every query."""
        return query + (F.silu(query @ weights["up"]) * (query @ weights["gate"])) @ weights["down"]

    def loss(self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
        """Half the squared distance of its answers from the values."""
        return 0.5 * (self.forward(weights, key) - value).square().sum((1, 2))


def main(steps: int = 200) -> list[float]:
    """Teach one memory five associations; returns the loss before every step and after the last."""
    memory = GatedMemory()
    teach = onnxruntime.InferenceSession(memory_gradient(memory, WIDTH).SerializeToString())
    answer = onnxruntime.InferenceSession(memory_answer(memory, WIDTH).SerializeToString())
    draw = np.random.default_rng(0)
    weights = {
        name: 0.2 * draw.standard_normal((1, *shape)).astype(np.float32)
        for name, shape in memory.parameters.items()
    }
    pairs = {name: draw.standard_normal((1, 5, WIDTH)).astype(np.float32) for name in ("key", "value")}
    optimizer, losses = Adam(0.02), []
    moments = {name: {kind: np.zeros_like(w) for kind in optimizer.moments} for name, w in weights.items()}
    names = [output.name for output in teach.get_outputs()]
    for count in range(steps):
        given = {f"past.{name}": array for name, array in weights.items()} | pairs
        found = dict(zip(names, teach.run(None, given), strict=True))
        losses.append(float(found["loss"][0]))
        for name, weight in list(weights.items()):
            step = Step(found[f"grad.{name}"], moments[name], count)
            weights[name], moments[name] = optimizer.step(weight, step)
    given = {f"past.{name}": array for name, array in weights.items()} | {"query": pairs["key"]}
    (answers,) = answer.run(None, given)
    losses.append(0.5 * float(np.square(answers - pairs["value"]).sum()))
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    history = main()
    print(f"loss {history[0]:.3f} before, {history[-1]:.6f} after {len(history) - 1} steps")
