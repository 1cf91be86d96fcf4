"""The whole architecture in one frozen dataclass, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_runtime.errors import DataError, UsageError
from titans_runtime.json_reader import parse_object

if TYPE_CHECKING:
    from titans_export.memory.tiles import MemoryForm

ARCHITECTURES = ("lmm", "mac", "mag", "mal")
_POSITIVE = (
    "vocab_size", "d_model", "layers", "heads", "head_dim", "d_ff", "tile", "memory_expansion", "period",
    "segment", "persistent",
)  # fmt: skip
_MOST = {"vocab_size": 2**24, "layers": 1024, "readout_buckets": 2**24}
_MOST_OTHERWISE = 2**16
_MOST_CONTEXT = 1024
_MOST_NUMBERS = 2**32  # of weights and of one memory: 16 GiB
_MAX_DEPTH = 4
_LISTS: tuple[str, ...] = ("readout_contexts", "readout_words")
BYTES = 256
"""Token ids of a model of bytes."""
WORD_REACH = 24
"""Bytes that a context of words reaches back at most."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Titans model (arXiv 2501.00663).

    Attributes:
        architecture: ``lmm``, the memory alone (section 3); ``mac``, memory as context (4.1); ``mag``,
            memory as gate (4.2); ``mal``, memory as layer (4.3).
        vocab_size: number of token ids; 256 for bytes.
        d_model: width of the residual stream.
        layers: number of memory layers, each followed by a feed-forward layer.
        heads: memory heads per layer.
        head_dim: ``Dk`` and ``Dv`` of one head's memory.
        d_ff: inner width of the feed-forward layer.
        conv_kernel: taps of the causal depthwise convolution on query, key and value.
        tile: tokens that the matrix form of the memory rule takes at once.
        memory_depth: 0 for a matrix as memory, 1 to 4 for an MLP of that many layers.
        memory_expansion: inner width of a deep memory, in head widths.
        period: tokens whose gradients are all taken at the memory as their period began; 1 is exact.
        momentum: whether writes have momentum.
        retention: whether the memory forgets.
        convolution: whether query, key and value are convolved.
        learned_memory: whether the memory begins with learned weights; a deep one must.
        window: tokens that attention sees in MAG and MAL, the current one included.
        segment: tokens of a segment in MAC.
        persistent: learned tokens that attention always sees.
        readout_contexts: lengths, in tokens, of the hashed contexts in the readout key.
        readout_words: numbers of words before the current one, in hashed contexts that begin where a word
            does, for vocabularies of bytes; at most :data:`WORD_REACH` bytes.
        readout_buckets: hash buckets for each of these contexts.
        readout_context_scale: length of each context's one-hot part of the readout key,
            beside the hidden part, whose length is 1. Buckets and scale were chosen on
            development files (benchmarks/editing): longer one-hot parts drown the hidden one.
    """

    architecture: str = "lmm"
    vocab_size: int = 256
    d_model: int = 192
    layers: int = 4
    heads: int = 3
    head_dim: int = 64
    d_ff: int = 640
    conv_kernel: int = 4
    tile: int = 32
    memory_depth: int = 0
    memory_expansion: int = 2
    period: int = 1
    momentum: bool = True
    retention: bool = True
    convolution: bool = True
    learned_memory: bool = False
    window: int = 64
    segment: int = 32
    persistent: int = 4
    readout_contexts: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    readout_words: tuple[int, ...] = ()
    readout_buckets: int = 1024
    readout_context_scale: float = 0.6

    def __post_init__(self) -> None:
        """Refuse a shape that no model can have.

        Raises:
            UsageError: a field is not positive; the message names it.
        """
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UsageError(f"config: architecture is {self.architecture!r}; known: {known}")
        self._check_ranges()
        if not 0 <= self.memory_depth <= _MAX_DEPTH:
            raise UsageError(f"config: memory_depth is {self.memory_depth}; it must be 0 to {_MAX_DEPTH}")
        if self.memory_depth and not self.learned_memory:
            raise UsageError("config: a deep memory begins with learned weights; set learned_memory")
        if self.window < 2:
            raise UsageError(f"config: window is {self.window}; it must be 2 or more")
        if self.architecture != "lmm" and self.head_dim % 2:
            raise UsageError(f"config: head_dim is {self.head_dim}; rotary positions need an even one")
        if self.architecture == "mac" and self.segment % self.period:
            raise UsageError(
                f"config: segment is {self.segment}, no multiple of the gradient period {self.period}"
            )
        if self.conv_kernel < 2:
            raise UsageError(f"config: conv_kernel is {self.conv_kernel}; it must be 2 or more")
        self._check_readout()
        if self._numbers > _MOST_NUMBERS:
            raise UsageError(
                f"config: about {self._numbers:.2g} weights and numbers of a memory; "
                f"at most {_MOST_NUMBERS:.2g} fit, make it smaller"
            )

    def _check_ranges(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UsageError(f"config: {name} is {getattr(self, name)}; it must be 1 or more")
        for name in (*_POSITIVE, "conv_kernel", "window", "readout_buckets"):
            most = _MOST.get(name, _MOST_OTHERWISE)
            if getattr(self, name) > most:
                raise UsageError(f"config: {name} is {getattr(self, name)}; it must be {most} or less")
        for name in _LISTS:
            if any(n > _MOST_CONTEXT for n in getattr(self, name)):
                raise UsageError(
                    f"config: {name} holds {max(getattr(self, name))}; at most {_MOST_CONTEXT} each"
                )

    def _check_readout(self) -> None:
        lengths = self.readout_contexts
        if not lengths or any(n < 1 for n in lengths) or self.readout_buckets < 1:
            raise UsageError("config: readout_contexts and readout_buckets must be 1 or more")
        if any(n < 0 for n in self.readout_words):
            raise UsageError(f"config: readout_words is {list(self.readout_words)}; they must be 0 or more")
        if self.readout_words and self.vocab_size != BYTES:
            raise UsageError(f"config: readout_words need a vocabulary of {BYTES} bytes")

    @property
    def _numbers(self) -> int:
        """Weights and numbers of one memory, near enough to tell what no machine holds."""
        width, memory = self.d_model, self.inner * self.head_dim
        memory *= 1 + self.memory_depth * self.memory_expansion
        layer = width * (4 * self.inner + 2 * self.d_ff + self.persistent) + 3 * self.inner * self.conv_kernel
        return (
            self.layers * (layer + memory)
            + (2 * width + self.readout_height) * self.vocab_size
            + width * width
        )

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def memory_form(self) -> MemoryForm:
        """Kind of the memory."""
        from titans_export.memory.tiles import MemoryForm  # with torch, which most commands do not need

        return MemoryForm(self.memory_depth, self.momentum, self.period)

    @property
    def gate_count(self) -> int:
        """Gates of a head: retention, momentum, step, as far as they are there."""
        return 1 + self.momentum + self.retention

    @property
    def counts_tokens(self) -> bool:
        """Whether the state holds the position: where periods, segments and windows begin."""
        return self.architecture != "lmm" or not self.memory_form.exact

    @property
    def readout_height(self) -> int:
        """Rows ``Dr`` of the readout memory: the dense part's, then those of every context."""
        return self.d_model + self.readout_hashes * self.readout_buckets

    @property
    def readout_hashes(self) -> int:
        """Hashed contexts of the readout key, each with a one-hot part."""
        return len(self.readout_contexts) + len(self.readout_words)

    @property
    def context_tail(self) -> int:
        """Past tokens that the longest hashed context reaches back, the current one not counted."""
        return max(*self.readout_contexts, WORD_REACH if self.readout_words else 2) - 1

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types."""
        fields = dataclasses.asdict(self)
        return fields | {name: list(fields[name]) for name in _LISTS}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Read a config from plain JSON types.

        Raises:
            DataError: a field is unknown, has another type than its default, or an impossible value.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in known:
                raise DataError(f"config: unknown field {name!r}; known: {', '.join(known)}")
            expected = list if name in _LISTS else type(known[name].default)
            if type(value) is not expected:
                raise DataError(f"config: {name} is {value!r}; expected {expected.__name__}")
            if isinstance(value, list) and not all(type(item) is int for item in value):
                raise DataError(f"config: {name} is {value!r}; expected integers")
        fields = fields | {name: tuple(fields[name]) for name in _LISTS if name in fields}
        try:
            return cls(**fields)
        except UsageError as error:  # here the value comes from a file
            raise DataError(str(error)) from None

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read ``config.json``.

        Raises:
            DataError: the file is missing or no valid config.
        """
        try:
            fields = parse_object(path.read_bytes(), path.name)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no readable config ({error})") from None
        return cls.from_dict(fields)


def overridden(config: ModelConfig, settings: Sequence[str]) -> ModelConfig:
    """``config`` with fields replaced by ``FIELD=VALUE`` settings, values as in JSON.

    Raises:
        UsageError: a setting has no value, or its field or value is not one of a config.
    """
    fields = config.to_dict()
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: expected FIELD=VALUE")
        try:
            fields[name] = json.loads(text)
        except (ValueError, RecursionError):
            fields[name] = text
    try:
        return ModelConfig.from_dict(fields)
    except DataError as error:
        raise UsageError(f"--set: {error}") from None


_DEEP: dict[str, Any] = {"memory_depth": 2, "period": 16, "learned_memory": True}
_TINY = ModelConfig(
    d_model=32, layers=2, heads=2, head_dim=16, d_ff=64, tile=8, readout_buckets=16, window=8, segment=8
)

_NANO: dict[str, Any] = {
    "readout_contexts": (1, 2, 3, 4, 6, 8, 12, 16),
    "readout_words": (0, 1, 2),
    "readout_context_scale": 0.7,
}
PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(**_NANO),
    "nano-ssm": ModelConfig(momentum=False, **_NANO),
    "nano-deep": ModelConfig(d_ff=576, **_DEEP, **_NANO),
    "nano-mac": ModelConfig(architecture="mac", layers=3, d_ff=576, **_NANO),
    "nano-mag": ModelConfig(architecture="mag", d_ff=464, **_NANO),
    "nano-mal": ModelConfig(architecture="mal", layers=3, **_NANO),
    "base": ModelConfig(d_model=512, layers=8, heads=8, d_ff=2048),
    "base-ssm": ModelConfig(d_model=512, layers=8, heads=8, d_ff=2048, momentum=False),
    "base-deep": ModelConfig(d_model=512, layers=8, heads=8, d_ff=2048, **_DEEP),
    "wide": ModelConfig(d_model=1024, layers=12, heads=16, d_ff=4096),
    "tiny": _TINY,
}
"""Named sizes: ``nano`` is trained and shipped, the others of its size are the rest of the family; ``base``
and ``wide`` serve latency work, ``tiny`` tests."""
