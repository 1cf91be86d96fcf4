"""What to learn at test time, and how: objective, optimizer and policy of a session's editor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from titans_runtime.errors import UsageError

OBJECTIVES = ("readout",)
OPTIMIZERS = ("sgd", "adagrad")
MAX_CHUNK = 1024
_NUMBERS: dict[str, type[int] | type[float]] = {"chunk": int, "step": float}
MAX_STEP = 1e6  # far beyond any use, and far from where float32 ends


@dataclass(frozen=True)
class Editor:
    """How a session edits its memory from the tokens that it sees.

    Attributes:
        objective: ``readout`` edits the memory on the logits by the next-token loss.
        step: step size ``θ`` on the summed loss of a chunk.
        optimizer: ``sgd`` is plain gradient descent. ``adagrad`` divides each row's step by
            ``√(1 + Σ ‖its gradients‖²)``, so rows that were written often move less (Duchi et al.
            2011, with one sum a row, as is usual for embedding tables).
        chunk: gradient period, in tokens: all gradients of a chunk are taken at the memory as it
            stood when the chunk began.
    """

    objective: str = "readout"
    step: float = 1.0
    chunk: int = 4
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: an unknown objective, or a value outside its range.
        """
        if self.objective not in OBJECTIVES:
            raise UsageError(f"editor objective {self.objective!r}; known: {', '.join(OBJECTIVES)}")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"editor optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if type(self.step) not in (int, float) or not 0 <= self.step <= MAX_STEP:
            raise UsageError(f"editor step is {self.step}; it must be a number from 0 to {MAX_STEP:g}")
        if not (type(self.chunk) is int and 1 <= self.chunk <= MAX_CHUNK):
            raise UsageError(f"editor chunk is {self.chunk}; it must be an integer from 1 to {MAX_CHUNK}")

    @property
    def graph(self) -> str:
        """Name of the gradient graph that the objective calls."""
        return f"gradient.{self.objective}"

    def to_dict(self) -> dict[str, Any]:
        """The editor as plain JSON types, as manifests and memory files keep it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Editor:
        """Read an editor from plain JSON types.

        Raises:
            UsageError: an unknown field, or a value outside its range.
        """
        known = [item.name for item in fields(cls)]
        for name in content:
            if name not in known:
                raise UsageError(f"editor field {name!r} is unknown; known: {', '.join(known)}")
        return cls(**content)

    @classmethod
    def parse(cls, text: str) -> Editor:
        """Read ``OBJECTIVE[:NAME=VALUE,…]``, for example ``readout:step=1,chunk=4``.

        Raises:
            UsageError: the text is malformed; the message names the part.
        """
        objective, _, settings = text.partition(":")
        content: dict[str, Any] = {"objective": objective}
        for setting in filter(None, settings.split(",")):
            name, equals, value = setting.partition("=")
            if name in content:
                raise UsageError(f"--editor {text}: {name} is given twice")
            try:
                content[name] = value if name == "optimizer" else _NUMBERS.get(name, float)(value)
            except ValueError:
                equals = ""
            if not equals:
                raise UsageError(f"--editor {text}: {setting!r} is not NAME=VALUE (step, chunk, optimizer)")
        return cls.from_dict(content)


@dataclass
class EditReport:
    """What one call learnt.

    Attributes:
        tokens: tokens that the call was given.
        loss: mean loss in nats over the tokens that were learnt from, as predicted before the
            memory saw them; NaN where none was.
        surprise: that loss for each of them, in stream order.
        gradient_norm: norm of the gradient of each update.
        updates: updates applied.
        skipped: chunks that taught nothing, their targets being the model's own samples.
        seconds: time spent in gradient graph and update.
    """

    tokens: int = 0
    surprise: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    updates: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean of ``surprise``."""
        return sum(self.surprise) / len(self.surprise) if self.surprise else math.nan
