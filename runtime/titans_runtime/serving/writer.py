"""From the pieces of a stream to texts and log-probabilities."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.serving.completion import stops_of
from titans_runtime.serving.request import Piece
from titans_runtime.serving.schema import CompletionRequest, Logprobs


@dataclass
class Writer:
    """Turns one session's pieces into texts; a character may span several.

    A stop text is no part of the answer. What may become one is held back until it is known.

    Attributes:
        asked: the request.
        is_new: whether the session had seen nothing: its first token then has no probability.
        offset: characters written so far.
    """

    asked: CompletionRequest
    is_new: bool
    offset: int = 0
    _held: list[Piece] = field(default_factory=list)
    _stops: list[list[int]] = field(default_factory=list)
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def __post_init__(self) -> None:
        """Read the stop texts."""
        self._stops = [list(stop) for stop in stops_of(self.asked)]

    def write(self, pieces: list[Piece], end: str | None) -> tuple[str, Logprobs | None]:
        """The text of some pieces, and their log-probabilities where asked for.

        Args:
            pieces: those after the last call's; a piece that was drawn is one token.
            end: why nothing follows them, as the scheduler calls it; None where something may.
        """
        shown = self._released([piece for piece in pieces if piece.drawn or self.asked.echo], end)
        tokens = np.concatenate([piece.tokens for piece in shown]) if shown else np.empty(0, np.int64)
        content = bytes(token if token < 256 else 63 for token in tokens.tolist())
        logprobs = None
        if self.asked.logprobs is None:
            text = self._decoder.decode(content, final=end is not None)
            self.offset += len(text)
        else:
            text, offsets = self._placed(content, end)
            logprobs = self._logprobs(shown, tokens, offsets)
        if any(not piece.drawn for piece in pieces):
            self.is_new = False
        return text, logprobs

    def _released(self, new: list[Piece], end: str | None) -> list[Piece]:
        """What is known to be of the answer, held back or new."""
        if not self._stops:
            return new
        pieces = [*self._held, *new]
        drawn = [int(piece.tokens[0]) for piece in pieces if piece.drawn]
        kept = len(pieces) - self._of_a_stop(drawn, end)
        self._held = [] if end else pieces[kept:]
        return pieces[:kept]

    def _of_a_stop(self, drawn: list[int], end: str | None) -> int:
        """Drawn tokens, from the last one back, that are a stop text, or may become one."""
        if end is None:
            return max(_overlap(drawn, stop) for stop in self._stops)
        if end != "stop":
            return 0
        return max((len(stop) for stop in self._stops if drawn[-len(stop) :] == stop), default=0)

    def _placed(self, content: bytes, end: str | None) -> tuple[str, list[int]]:
        """A text, and for each of its bytes the character that it belongs to."""
        texts, offsets = [], []
        for place in range(len(content)):
            texts.append(self._decoder.decode(content[place : place + 1]))
            self.offset += len(texts[-1])
            begun = self._decoder.getstate()[0]  # a character's first bytes, or what turns out to be none's
            offsets.append(self.offset + len(begun.decode("utf-8", "replace")) - 1)
        texts.append(self._decoder.decode(b"", final=end is not None))
        self.offset += len(texts[-1])
        return "".join(texts), offsets

    def _logprobs(self, shown: list[Piece], tokens: Array, offsets: list[int]) -> Logprobs:
        scores = [piece.scores for piece in shown if piece.scores is not None]
        if not scores:
            return Logprobs(tokens=[], token_logprobs=[], top_logprobs=None, text_offset=[])
        table = log_probabilities(np.concatenate(scores))
        own: list[float | None] = table[np.arange(len(tokens)), tokens].round(6).tolist()
        top: list[dict[str, float] | None] | None = None
        if self.asked.logprobs:
            best = np.argsort(-table, axis=1, kind="stable")[:, : self.asked.logprobs]
            top = [
                {name_of(int(token)): round(float(row[token]), 6) for token in ids}
                for row, ids in zip(table, best, strict=True)
            ]
        if self.is_new and not shown[0].drawn:
            own[0] = None
            if top:
                top[0] = None
        return Logprobs(
            tokens=[name_of(token) for token in tokens.tolist()],
            token_logprobs=own,
            top_logprobs=top,
            text_offset=offsets,
        )


def _overlap(drawn: list[int], stop: list[int]) -> int:
    """Length of the longest beginning of a stop text with which the drawn tokens end."""
    longest = min(len(drawn), len(stop))
    found = (n for n in range(longest, 0, -1) if drawn[-n] == stop[0] and drawn[-n:] == stop[:n])
    return next(found, 0)


def log_probabilities(logits: Array) -> Array:
    """Of logits ``(T, V)``, in nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def name_of(token: int) -> str:
    """A token as OpenAI shows one that need not be text."""
    return chr(token) if 32 <= token < 127 else f"bytes:\\x{token:02x}"
