"""From a completion request to the scheduler, and from its pieces to texts and log-probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.editor import Editor
from titans_runtime.errors import UsageError
from titans_runtime.model import RECOMMENDED
from titans_runtime.sampling import Sampling
from titans_runtime.serving.request import Piece, Request
from titans_runtime.serving.schema import CompletionRequest, Editing, Logprobs
from titans_runtime.session import Session
from titans_runtime.tokens import Tokens, checked_tokens

if TYPE_CHECKING:
    from titans_runtime.model import Model

MAX_PROMPTS: Final = 16
MAX_STOPS: Final = 4
REASONS: Final = {"deadline": "timeout"}
"""What the scheduler calls otherwise than the answers do."""


def new_session(model: Model, editing: Editing | None) -> Session:
    """A session that learns as a caller asks.

    Raises:
        UsageError: a value is out of range, or the bundle cannot be edited so.
    """
    edit = editing.edit if editing else None
    text = editing.editor if editing else None
    if text is None:
        editor: Any = RECOMMENDED
    else:
        editor = None if text == "none" else Editor.parse(text)
    return model.session(RECOMMENDED if edit is None else edit, editor)


def prompts_of(asked: CompletionRequest, model: Model) -> list[Tokens]:
    """The prompts as tokens.

    Raises:
        UsageError: they are too many, or text for a model that takes none.
        TokenError: an id is out of range.
    """
    given = asked.prompt
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    parts: list[Any] = list(given) if several else [given]
    if len(parts) > MAX_PROMPTS:
        raise UsageError(f"prompt: {len(parts)} prompts in one request; the limit is {MAX_PROMPTS}")
    if several and asked.memory is not None:
        raise UsageError("prompt: a memory takes one prompt at a time")
    return [_tokens(part, model) for part in parts]


def _tokens(part: str | list[int], model: Model) -> Tokens:
    if not part:
        return b""
    if isinstance(part, str):
        if model.manifest.tokenizer != "bytes":
            raise UsageError(f"prompt: the tokenizer is {model.manifest.tokenizer!r}; give token ids")
        return part.encode("utf-8", "surrogatepass")
    if any(not -(2**62) < token < 2**62 for token in part):
        raise UsageError("prompt: a token id is out of range")
    return checked_tokens(part, model.vocab_size)


def stops_of(asked: CompletionRequest) -> tuple[tuple[int, ...], ...]:
    """The stop texts as tokens.

    Raises:
        UsageError: they are too many, or one is empty.
    """
    texts = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if len(texts) > MAX_STOPS or not all(texts):
        raise UsageError(f"stop: give up to {MAX_STOPS} texts, none of them empty")
    return tuple(tuple(text.encode("utf-8", "surrogatepass")) for text in texts)


def request_of(
    asked: CompletionRequest, make: Callable[[], Session], prompt: Tokens, owner: str, deadline: float
) -> Request:
    """What the scheduler is asked; ``make``: opens the session.

    Raises:
        UsageError: a value is out of range.
    """
    return Request(
        make,
        prompt,
        asked.max_tokens,
        Sampling(asked.temperature, asked.top_k, asked.top_p),
        asked.seed,
        asked.learn,
        stops_of(asked),
        deadline,
        owner,
        scores=asked.logprobs is not None,
    )


@dataclass
class Writer:
    """Turns one session's pieces into texts; a character may span several.

    Attributes:
        asked: the request.
        is_new: whether the session had seen nothing: its first token then has no probability.
        offset: characters written so far.
    """

    asked: CompletionRequest
    is_new: bool
    offset: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def write(self, pieces: list[Piece], last: bool) -> tuple[str, Logprobs | None]:
        """The text of some pieces, and their log-probabilities where asked for."""
        shown = [piece for piece in pieces if piece.drawn or self.asked.echo]
        tokens = np.concatenate([piece.tokens for piece in shown]) if shown else np.empty(0, np.int64)
        content = bytes(token if token < 256 else 63 for token in tokens.tolist())
        text = self._decoder.decode(content, final=last)
        logprobs = self._logprobs(shown, tokens) if self.asked.logprobs is not None else None
        if any(not piece.drawn for piece in pieces):
            self.is_new = False
        self.offset += len(text)
        return text, logprobs

    def _logprobs(self, shown: list[Piece], tokens: Array) -> Logprobs:
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
            text_offset=[self.offset + i for i in range(len(tokens))],
        )


def log_probabilities(logits: Array) -> Array:
    """Of logits ``(T, V)``, in nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def name_of(token: int) -> str:
    """A token as OpenAI shows one that need not be text."""
    return chr(token) if 32 <= token < 127 else f"bytes:\\x{token:02x}"
