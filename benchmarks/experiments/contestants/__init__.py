"""Who takes part: two layers each, within a few percent of one number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.experiments.contestants.lstm import LSTM
from benchmarks.experiments.contestants.mamba import Selective
from benchmarks.experiments.contestants.network import Mixer, Network, Residual
from benchmarks.experiments.contestants.s4d import DiagonalStateSpace
from benchmarks.experiments.contestants.titans import Titans
from benchmarks.experiments.contestants.transformer import Attention
from titans_export.config import ModelConfig

WIDTH = 64
_LAYERS = 2
_TITANS: dict[str, Any] = {
    "d_model": WIDTH,
    "layers": _LAYERS,
    "heads": 2,
    "head_dim": 32,
    "readout_contexts": (1, 2, 4),
    "readout_buckets": 256,
    "readout_context_scale": 2.0,  # tokens here are symbols: contexts say more than features
}


@dataclass(frozen=True)
class Contestant:
    """One way to build and train.

    Attributes:
        label: in tables.
        build: from the vocabulary's size.
        ways: to edit it at test time, beside running it as it was trained: of :mod:`..evaluate`.
        tasks: that it takes part in unless asked for by name; None for all.
        trained: False leaves the weights as they are drawn.
    """

    label: str
    build: Callable[[int], Network]
    ways: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    trained: bool = True

    def takes_part(self, task: str) -> bool:
        """Whether it is trained on ``task`` unless it is asked for by name."""
        return self.tasks is None or task in self.tasks


def _transformer(vocab_size: int) -> Network:
    return Residual(vocab_size, WIDTH, [Attention(WIDTH, 2) for _ in range(_LAYERS)], d_ff=256)


def _s4d(vocab_size: int) -> Network:
    return Residual(vocab_size, WIDTH, [DiagonalStateSpace(WIDTH, 64) for _ in range(_LAYERS)], d_ff=256)


def _mamba(vocab_size: int, write_spread: float = 0.0) -> Network:
    width = 80  # the block has no feed-forward layer beside it, and is that much wider for it
    mixers: list[Mixer] = [Selective(width, write_spread=write_spread) for _ in range(_LAYERS)]
    return Residual(vocab_size, width, mixers, d_ff=0)


def _lstm(vocab_size: int) -> Network:
    return LSTM(vocab_size, 78)


def _titans(vocab_size: int, edit: float, write_spread: float = 0.0, **settings: Any) -> Network:  # noqa: ANN401 - of a config
    return Titans(ModelConfig(vocab_size=vocab_size, **(_TITANS | settings)), edit, write_spread)


_SSM = {"d_ff": 216, "momentum": False}
_DELTA = _SSM | {"retention": False, "conv_kernel": 2}  # two taps: keys that hang on fewer tokens
_WRITE_SPREAD = 2.0
_READOUT_TASKS = (
    "mqar", "induction-fresh", "copy", "selective", "digits", "scan-simple", "scan-length",
    "scan-addprim_jump",
)  # fmt: skip
CONTESTANTS: dict[str, Contestant] = {
    "transformer": Contestant("Transformer, rotary", _transformer),
    "s4d": Contestant("S4D", _s4d),
    "mamba": Contestant("Mamba", _mamba),
    "mamba-scaled": Contestant(
        "Mamba, writes scaled at random in training",
        partial(_mamba, write_spread=_WRITE_SPREAD),
        tasks=(),  # whether it takes this memory for the noise to help: by name
    ),
    "lstm": Contestant("LSTM", _lstm),
    "titans-untrained": Contestant(
        "Titans LMM, **not trained**",
        partial(_titans, edit=0.0, **_SSM),
        ("readout",),
        _READOUT_TASKS,
        trained=False,
    ),
    "titans-ssm": Contestant(
        "Titans LMM, trained λ = 0", partial(_titans, edit=0.0, **_SSM), ("fused", "readout", "prediction")
    ),
    "titans-lmm": Contestant(
        "Titans LMM, trained λ = 1", partial(_titans, edit=1.0, **_SSM), ("off", "readout")
    ),
    "titans-delta": Contestant(
        "Titans LMM, no retention, two taps, trained λ = 1",
        partial(_titans, edit=1.0, **_DELTA),
        ("off", "readout"),
        (),  # what the next one is without its noise: by name
    ),
    "titans-scaled": Contestant(
        "Titans LMM, no retention, two taps, writes scaled at random in training, λ = 1",
        partial(_titans, edit=1.0, write_spread=_WRITE_SPREAD, **_DELTA),
        ("off", "readout"),
        ("induction", "induction-long"),
    ),
    "titans-mac": Contestant(
        "Titans MAC, trained λ = 1", partial(_titans, edit=1.0, architecture="mac", d_ff=64, momentum=False)
    ),
}


_QUICK = ("transformer", "s4d", "lstm")
"""Whose training and questions take least; see the times in benchmarks/NOTES.md."""


def slowest_first(task: str) -> list[str]:
    """:func:`entrants`, so that where several train at a time no long training is left to the end."""
    return sorted(entrants(task), key=lambda name: name in _QUICK)


def entrants(task: str) -> list[str]:
    """The names of those that are trained on ``task``."""
    return [name for name, contestant in CONTESTANTS.items() if contestant.takes_part(task)]
