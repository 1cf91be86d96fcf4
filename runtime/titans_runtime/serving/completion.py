"""From a completion request to what the scheduler is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from titans_runtime.editor import Editor
from titans_runtime.errors import UsageError
from titans_runtime.model import RECOMMENDED
from titans_runtime.sampling import Sampling
from titans_runtime.serving.request import Request
from titans_runtime.serving.schema import CompletionRequest, Editing
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
