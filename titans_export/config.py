"""The whole architecture in one frozen dataclass, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_runtime.errors import DataError, UsageError


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Titans model (arXiv 2501.00663, section 3: the long-term memory module, LMM).

    Attributes:
        vocab_size: number of token ids; 256 for bytes.
        d_model: width of the residual stream.
        layers: number of memory layers, each followed by a feed-forward layer.
        heads: memory heads per layer.
        head_dim: ``Dk`` and ``Dv`` of one head's memory.
        d_ff: inner width of the feed-forward layer.
        conv_kernel: taps of the causal depthwise convolution on query, key and value.
        tile: tokens that the matrix form of the memory rule takes at once.
        readout_contexts: lengths, in tokens, of the hashed contexts in the readout key.
        readout_buckets: hash buckets for each of these lengths.
        readout_context_scale: length of each context's one-hot part of the readout key,
            beside the hidden part, whose length is 1. Buckets and scale were chosen on
            development files (benchmarks/editing): longer one-hot parts drown the hidden one.
    """

    vocab_size: int = 256
    d_model: int = 192
    layers: int = 4
    heads: int = 3
    head_dim: int = 64
    d_ff: int = 640
    conv_kernel: int = 4
    tile: int = 32
    readout_contexts: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    readout_buckets: int = 1024
    readout_context_scale: float = 0.6

    def __post_init__(self) -> None:
        """Refuse a shape that no model can have.

        Raises:
            UsageError: a field is not positive; the message names it.
        """
        for name in ("vocab_size", "d_model", "layers", "heads", "head_dim", "d_ff", "tile"):
            if getattr(self, name) < 1:
                raise UsageError(f"config: {name} is {getattr(self, name)}; it must be 1 or more")
        if self.conv_kernel < 2:
            raise UsageError(f"config: conv_kernel is {self.conv_kernel}; it must be 2 or more")
        if any(n < 1 for n in self.readout_contexts) or self.readout_buckets < 1:
            raise UsageError("config: readout_contexts and readout_buckets must be 1 or more")

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: query, key and value of all heads."""
        return 3 * self.inner

    @property
    def readout_key_dim(self) -> int:
        """Width ``Dr`` of the readout memory's key."""
        return self.d_model + len(self.readout_contexts) * self.readout_buckets

    @property
    def context_tail(self) -> int:
        """Past tokens that the longest hashed context reaches back, the current one not counted."""
        return max((*self.readout_contexts, 2)) - 1

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types."""
        fields = dataclasses.asdict(self)
        return fields | {"readout_contexts": list(self.readout_contexts)}

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
            expected = list if name == "readout_contexts" else type(known[name].default)
            if type(value) is not expected:
                raise DataError(f"config: {name} is {value!r}; expected {expected.__name__}")
        contexts = fields.get("readout_contexts", [])
        if not all(type(length) is int for length in contexts):
            raise DataError(f"config: readout_contexts is {contexts!r}; expected integers")
        if "readout_contexts" in fields:
            fields = fields | {"readout_contexts": tuple(contexts)}
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
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no readable config ({error})") from None
        if not isinstance(fields, dict):
            raise DataError(f"{path}: expected a JSON object of config fields")
        return cls.from_dict(fields)


PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(),
    "base": ModelConfig(d_model=512, layers=8, heads=8, d_ff=2048),
    "wide": ModelConfig(d_model=1024, layers=12, heads=16, d_ff=4096),
    "tiny": ModelConfig(d_model=32, layers=2, heads=2, head_dim=16, d_ff=64, tile=8, readout_buckets=16),
}
"""Named sizes: ``nano`` is trained and shipped, ``base`` and ``wide`` serve latency work, ``tiny`` tests."""
