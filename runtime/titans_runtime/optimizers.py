"""What a gradient does to a memory: one small class an optimizer.

An optimizer is pure: it is given a memory's value, its gradient and what it kept of earlier steps, and
returns new arrays, so that a step that is refused needs no undoing. A new one is a class with
``moments`` and ``step``, and an entry in :data:`OPTIMIZERS`, which a program may make, too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from titans_runtime.backends import Array, Arrays


@dataclass(frozen=True)
class Gates:
    """A model's own gates for the tokens of a step, ``(B, H, T)`` each; None where it has none.

    A step takes the product of the decays over its tokens, and the mean of the step sizes.
    """

    retention: Array | None = None
    momentum: Array | None = None
    step: Array | None = None


@dataclass(frozen=True)
class Step:
    """What one step is given besides the memory.

    Attributes:
        gradient: of the summed loss, of the memory's shape.
        moments: what the optimizer returned from the step before, by name; zeros at first.
        count: steps taken before.
        gates: the model's own.
    """

    gradient: Array
    moments: Arrays
    count: int = 0
    gates: Gates = field(default_factory=Gates)


class Optimizer(Protocol):
    """A rule for one memory at a time.

    Two attributes of its class are optional, and false where they are missing:

    ``shares_momentum``: its moment ``momentum`` is the model's own ``S``, sign and scale included: what is
    added to the memory. Where an editor's ``replace`` puts the step in the place of what the model writes,
    the first step of a period goes on from the model's momentum, and the last one's is written there. Others
    keep moments of their own.

    ``needs_matrices``: it works on matrices, the last two axes of ``(B, heads, rows, columns)``. An editor
    with it is refused for a memory that is a vector to each head.
    """

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the arrays of the memory's shape that it keeps from step to step."""
        ...

    def step(self, value: Array, given: Step) -> tuple[Array, Arrays]:
        """The memory after the step, and the moments to keep."""
        ...


@dataclass(frozen=True)
class Sgd:
    """``b ← μ b + g ;  M ← a M - θ b``, as ``torch.optim.SGD`` has it for ``a = 1``."""

    size: float = 1.0
    momentum: float = 0.0
    retention: float = 1.0

    @property
    def moments(self) -> tuple[str, ...]:
        """The momentum, where there is one."""
        return ("momentum",) if self.momentum else ()

    def step(self, value: Array, given: Step) -> tuple[Array, Arrays]:
        """See :class:`Optimizer`."""
        moved, kept = given.gradient, {}
        if self.momentum:
            moved = np.float32(self.momentum) * given.moments["momentum"] + moved
            kept = {"momentum": moved}
        return np.float32(self.retention) * value - np.float32(self.size) * moved, kept


@dataclass(frozen=True)
class Titans:
    """The memory's own rule (arXiv 2501.00663, equations 9, 10 and 13), with whatever gradient it is given.

    ``S ← η S - θ g ;  M ← a M + S``, with the gates that the model has derived from the tokens, unless
    others are given. ``size`` is a factor on the model's step, and the step itself where it has none.

    Attributes:
        size: factor on the model's step.
        momentum: ``η`` in place of the model's.
        retention: ``a`` in place of the model's.
        floor: least ``a``: bounds what one step forgets.
    """

    shares_momentum: ClassVar[bool] = True

    size: float = 1.0
    momentum: float | None = None
    retention: float | None = None
    floor: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        """``S``."""
        return ("momentum",)

    def step(self, value: Array, given: Step) -> tuple[Array, Arrays]:
        """See :class:`Optimizer`."""
        gates, shape = given.gates, value.shape
        a = _decay(gates.retention, self.retention, 1.0, shape)
        eta = _decay(gates.momentum, self.momentum, 0.0, shape)
        theta = np.float32(1) if gates.step is None else _spread(gates.step.mean(-1), shape)
        a = np.maximum(a, np.float32(self.floor))
        momentum = eta * given.moments["momentum"] - np.float32(self.size) * theta * given.gradient
        return a * value + momentum, {"momentum": momentum}


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba 2015, as ``torch.optim.Adam`` has it."""

    size: float = 1.0
    momentum: float = 0.9
    square_decay: float = 0.999
    eps: float = 1e-8
    retention: float = 1.0

    @property
    def moments(self) -> tuple[str, ...]:
        """Running means of the gradient and of its square."""
        return ("mean", "square")

    def step(self, value: Array, given: Step) -> tuple[Array, Arrays]:
        """See :class:`Optimizer`."""
        first, second = np.float32(self.momentum), np.float32(self.square_decay)
        mean = first * given.moments["mean"] + (1 - first) * given.gradient
        square = second * given.moments["square"] + (1 - second) * given.gradient**2
        count = given.count + 1
        size = np.float32(self.size / (1 - self.momentum**count))
        spread = np.sqrt(square) / np.float32(math.sqrt(1 - self.square_decay**count)) + np.float32(self.eps)
        moved = np.float32(self.retention) * value - size * mean / spread
        return moved, {"mean": mean, "square": square}


@dataclass(frozen=True)
class Muon:
    """The step orthogonalised by Newton-Schulz, matrix by matrix (Jordan 2024; ATLAS, LaCT).

    As ``torch.optim.Muon`` has it, without weight decay, and in float32 where that rounds to bfloat16.
    """

    needs_matrices: ClassVar[bool] = True

    size: float = 1.0
    momentum: float = 0.95
    retention: float = 1.0

    @property
    def moments(self) -> tuple[str, ...]:
        """A running mean of the gradient."""
        return ("mean",)

    def step(self, value: Array, given: Step) -> tuple[Array, Arrays]:
        """See :class:`Optimizer`."""
        keep = np.float32(self.momentum)
        mean = keep * given.moments["mean"] + (1 - keep) * given.gradient
        looked_ahead = keep * mean + (1 - keep) * given.gradient
        rows, columns = value.shape[-2:]
        size = np.float32(self.size * math.sqrt(max(1.0, rows / columns)))
        return np.float32(self.retention) * value - size * orthogonalised(looked_ahead), {"mean": mean}


@dataclass(frozen=True)
class Adagrad:
    """``G ← G + g² ;  M ← M - θ g / √(1 + G)`` (Duchi et al. 2011), number by number."""

    size: float = 1.0
    retention: float = 1.0

    @property
    def moments(self) -> tuple[str, ...]:
        """The sum of squares."""
        return ("square",)

    def step(self, value: Array, given: Step) -> tuple[Array, Arrays]:
        """See :class:`Optimizer`."""
        square = given.moments["square"] + given.gradient**2
        moved = np.float32(self.size) * given.gradient / np.sqrt(1 + square)
        return np.float32(self.retention) * value - moved, {"square": square}


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": Sgd,
    "adagrad": Adagrad,
    "titans": Titans,
    "adam": Adam,
    "muon": Muon,
}
"""By the name that an editor gives: from ``size``, the step, and those of ``momentum``, ``retention`` and
``floor`` that its signature names. An editor can set these and no others.
"""


def settings(name: str) -> tuple[str, ...]:
    """What an editor can set of an optimizer besides its step."""
    taken = inspect.signature(OPTIMIZERS[name]).parameters
    return tuple(setting for setting in ("momentum", "retention", "floor") if setting in taken)


_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonalised(matrices: Array) -> Array:
    """Singular values drawn towards 1 by five Newton-Schulz rounds: ``(…, m, n)`` → the same shape."""
    a, b, c = (np.float32(x) for x in _NEWTON_SCHULZ)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = np.swapaxes(matrices, -1, -2) if tall else matrices
    norm = np.sqrt(np.square(x, dtype=np.float64).sum((-2, -1), keepdims=True))  # of numbers beyond 1e19, too
    x = (x / np.maximum(norm, 1e-7)).astype(np.float32)
    for _ in range(_ROUNDS):
        gram = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return np.swapaxes(x, -1, -2) if tall else x


def _decay(own: Array | None, given: float | None, default: float, shape: tuple[int, ...]) -> Array:
    """A decay over all tokens of the step: the one given, or the model's, or ``default``."""
    if given is not None:
        return np.asarray(given, np.float32)
    if own is None:
        return np.asarray(default, np.float32)
    return _spread(own.prod(-1), shape)


def _spread(gate: Array, shape: tuple[int, ...]) -> Array:
    """A gate of the first axes of a memory, with axes of size 1 for the others."""
    return np.asarray(gate, np.float32).reshape(*gate.shape, *[1] * (len(shape) - gate.ndim))
