"""Random inputs of the memory rule, ordinary and extreme."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

TILE = 8
INPUTS = (
    "query",
    "key",
    "value",
    "log_retention",
    "log_momentum",
    "step",
    "edit",
    "past_memory",
    "past_momentum",
)


@dataclass(frozen=True)
class MemoryCase:
    """What hypothesis draws; ``tensors()`` makes the float64 inputs from it."""

    tokens: int
    seed: int
    retention: str
    momentum: str
    step: str
    repeated_keys: bool
    edit: tuple[float, float]

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        batch, heads, key_dim, value_dim = 2, 3, 16, 5

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def gate(kind: str) -> Tensor:
            uniform = torch.rand(batch, heads, self.tokens, generator=generator, dtype=torch.float64)
            return {
                "zero": torch.zeros_like(uniform),
                "one": torch.ones_like(uniform),
                "random": uniform,
                "near_one": 1 - 1e-3 * uniform,
                "sometimes_zero": torch.where(uniform < 0.2, 0.0, uniform),
            }[kind]

        key = torch.nn.functional.normalize(normal(batch, heads, self.tokens, key_dim), dim=-1)
        if self.repeated_keys:
            key = key[:, :, :1].expand_as(key).clone()
        return {
            "query": torch.nn.functional.normalize(normal(batch, heads, self.tokens, key_dim), dim=-1),
            "key": key,
            "value": normal(batch, heads, self.tokens, value_dim),
            "log_retention": gate(self.retention).log(),
            "log_momentum": gate(self.momentum).log(),
            "step": gate(self.step),
            "edit": torch.tensor(self.edit, dtype=torch.float64),
            "past_memory": normal(batch, heads, key_dim, value_dim),
            "past_momentum": 0.1 * normal(batch, heads, key_dim, value_dim),
        }


_strength = st.sampled_from([0.0, 0.3, 1.0])

memory_cases = st.builds(
    MemoryCase,
    tokens=st.integers(1, 3 * TILE + 1),
    seed=st.integers(0, 2**31),
    retention=st.sampled_from(["zero", "one", "random", "near_one", "sometimes_zero"]),
    momentum=st.sampled_from(["zero", "random", "near_one", "sometimes_zero"]),
    step=st.sampled_from(["zero", "one", "random"]),
    repeated_keys=st.booleans(),
    edit=st.tuples(_strength, _strength),
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = expected.abs().max().clamp_min(1e-30)
    return float((actual.double() - expected).abs().max() / scale)
