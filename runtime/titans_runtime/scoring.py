"""Bits per byte of a text under a session, streamed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from titans_runtime.backends import Array
from titans_runtime.forward import SEGMENT
from titans_runtime.session import Session
from titans_runtime.tokens import checked_tokens


@dataclass(frozen=True)
class Score:
    """How well a session predicted a text.

    Attributes:
        bits: ``(T,)`` float32, ``-log2 p`` of every token, each before the memory saw it.
        seconds: time that the session took.
    """

    bits: npt.NDArray[np.float32] = field(repr=False)
    seconds: float

    @property
    def bits_per_token(self) -> float:
        """Mean over all tokens; for a byte vocabulary, bits per byte."""
        return float(self.bits.mean(dtype=np.float64))

    @property
    def tokens_per_second(self) -> float:
        """Throughput, scoring included."""
        return len(self.bits) / self.seconds if self.seconds else float("inf")


def score(session: Session, text: bytes, progress: Iterable[int] | None = None) -> Score:
    """Stream ``text`` through ``session`` and score every token under what came before it.

    A session that has seen nothing predicts the first token uniformly.

    Args:
        session: moves on by the text.
        text: at least one byte.
        progress: yields the starts of the segments, wrapped in a bar.

    Raises:
        TokenError: the text is empty.
    """
    ids = checked_tokens(text, session.model.vocab_size)
    bits = np.empty(len(ids), np.float32)
    began = time.perf_counter()
    before = session.last_logits
    if before is None:
        before = np.zeros(session.model.vocab_size, np.float32)
    for start in progress if progress is not None else segment_starts(len(ids)):
        part = ids[start : start + SEGMENT]
        logits = session.append(part)
        bits[start : start + len(part)] = _bits(np.vstack([before, logits[:-1]]), part)
        before = logits[-1]
    return Score(bits, time.perf_counter() - began)


def segment_starts(tokens: int) -> range:
    """Where the segments of a text of ``tokens`` tokens begin."""
    return range(0, tokens, SEGMENT)


def _bits(logits: Array, targets: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1))
    bits: Array = (log_total - shifted[np.arange(len(targets)), targets]) / np.float32(np.log(2))
    return bits
