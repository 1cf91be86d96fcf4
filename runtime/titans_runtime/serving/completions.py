"""The way of a completion through the server: a memory in hand, streams of tokens, parts of an answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from titans_runtime.errors import ConflictError, OverloadError, UsageError
from titans_runtime.serving.completion import REASONS, new_session, prompts_of, request_of
from titans_runtime.serving.inbox import Inbox
from titans_runtime.serving.memories import Description
from titans_runtime.serving.request import Finished, Opened, Piece, Stream
from titans_runtime.serving.schema import Choice, Completion, CompletionRequest, Logprobs, Memory, Usage
from titans_runtime.serving.service import Service
from titans_runtime.serving.writer import Writer
from titans_runtime.session import Session
from titans_runtime.tokens import Tokens

_KEPT = ("length", "stop")
"""Ends after which a memory is kept as it stands; after others, if the prompt was read to its end."""


class Running:
    """One completion request under way: a memory or none, one stream a prompt."""

    def __init__(self, service: Service, asked: CompletionRequest, owner: str) -> None:
        """Then :meth:`begin`, and whatever happens :meth:`end`."""
        self._service, self._asked, self._owner = service, asked, owner
        self._key: str | None = None
        self._sessions: dict[int, Session] = {}
        self._streams: list[Stream] = []
        self._writers: dict[int, Writer] = {}
        self._inbox = Inbox()
        self._ends: dict[int, Finished] = {}
        self._began = time.perf_counter()
        limit = service.settings.max_seconds
        self._deadline = service.scheduler.clock() + min(asked.timeout or limit, limit)
        self._drew = False
        self._commit: asyncio.Future[Description] | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        service.under_way.add(self._over)
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    @property
    def is_closing(self) -> bool:
        """Whether the server is."""
        return self._service.is_closing

    def time_left(self) -> float:
        """Seconds until the request's time is up; 0 where it is."""
        return max(self._deadline - self._service.scheduler.clock(), 0.0)

    async def begin(self) -> None:
        """Check everything, take the memory, queue the streams; return when the first of them begins.

        Sessions are opened by the scheduler, when there is a slot: what waits costs next to nothing.

        Raises:
            TitansError: the request cannot be meant, is refused, or could not begin.
        """
        self._service.check_open()
        prompts = self._checked()
        self._queue(prompts)
        await self._note()
        for row, end in self._ends.items():
            self._check(row, end)

    def _checked(self) -> list[Tokens]:
        asked, service = self._asked, self._service
        if asked.model is not None and asked.model not in (service.name, service.model.manifest.identity):
            raise HTTPException(404, f"model: {asked.model!r} is not served here; this is {service.name!r}")
        if asked.max_tokens > service.settings.max_tokens:
            raise UsageError(
                f"max_tokens: {asked.max_tokens}; the limit here is {service.settings.max_tokens}"
            )
        if asked.memory is not None and asked.editing is not None:
            raise UsageError("editing: a memory has its own, which it was created with; leave it out")
        prompts = prompts_of(asked, service.model)
        if asked.memory is None and not all(len(prompt) for prompt in prompts):
            raise UsageError("the session has seen no token yet; give a prompt")
        return prompts

    def _queue(self, prompts: list[Tokens]) -> None:
        asked, service = self._asked, self._service
        make: Callable[[], Session] = partial(new_session, service.model, asked.editing)
        if asked.memory is not None:
            self._key = service.memories.take(self._owner, asked.memory)
            make = partial(service.memories.session, self._key)
        for row, prompt in enumerate(prompts):
            request = request_of(asked, make, prompt, self._owner, self._deadline)
            self._streams.append(service.scheduler.submit(request, self._inbox.of(row)))

    async def end(self) -> None:
        """Let go of everything, also where the caller's task is cancelled meanwhile.

        What is under way is cancelled and not kept.
        """
        task = asyncio.ensure_future(self._end())
        self._service.under_way.add(task)
        task.add_done_callback(self._service.under_way.discard)
        await asyncio.shield(task)

    async def _end(self) -> None:
        try:
            await self._let_go()
        finally:
            self._service.under_way.discard(self._over)
            self._over.set_result(None)

    async def _let_go(self) -> None:
        for stream in self._streams:
            stream.cancel()
        while len(self._ends) < len(self._streams):
            await self._note()
        if self._commit is not None:  # a caller that has gone does not stop the thread that saves
            await asyncio.wait([self._commit])
        if self._key is not None:
            self._service.memories.release(self._key)
            self._key = None
        # An error that was raised has frames that hold this object: the sessions are not to wait for it.
        self._streams, self._sessions, self._writers = [], {}, {}
        self._service.metrics.completion.observe(time.perf_counter() - self._began)

    async def parts(self) -> AsyncIterator[list[tuple[int, str, Logprobs | None, str | None]]]:
        """What has come since the last part: for each prompt text, log-probabilities and the end.

        Raises:
            TitansError: a stream failed, or ended before its prompt was read.
        """
        left = len(self._streams)
        while left:
            found = [await self._note()]
            while not self._inbox.is_empty:
                found.append(await self._note())
            rows: dict[int, list[Piece | Finished]] = {}
            for row, event in found:
                if event is not None:
                    rows.setdefault(row, []).append(event)
            left -= sum(isinstance(event, Finished) for _, event in found)
            if rows:
                yield [self._part(row, events) for row, events in rows.items()]

    async def _note(self) -> tuple[int, Piece | Finished | None]:
        """Take the next event, and note at once that a stream has begun or ended.

        A session stays here alone: a frame that held it would keep it, where an error keeps the frame.
        """
        row, event = await self._inbox.get()
        if isinstance(event, Opened):
            self._sessions[row] = event.session
            self._writers[row] = Writer(self._asked, is_new=event.position == 0)
            return row, None
        if isinstance(event, Finished):
            self._ends[row] = event
        return row, event

    def _part(self, row: int, events: list[Piece | Finished]) -> tuple[int, str, Logprobs | None, str | None]:
        pieces = [event for event in events if isinstance(event, Piece)]
        if not self._drew and any(piece.drawn for piece in pieces):
            self._drew = True
            self._service.metrics.first_token.observe(time.perf_counter() - self._began)
        end = next((event for event in events if isinstance(event, Finished)), None)
        if end is not None:
            self._check(row, end)
        text, logprobs = self._writers[row].write(pieces, end.reason if end else None)
        if end is None:
            return row, text, logprobs, None
        return row, text, logprobs, REASONS.get(end.reason, end.reason)

    def _check(self, row: int, end: Finished) -> None:
        if end.error is not None:
            raise end.error
        prompt = len(self._streams[row].request.prompt)
        if end.reason in _KEPT or (row in self._sessions and end.read == prompt):
            return
        if end.reason == "closed":
            raise OverloadError("the server closes before the prompt was read; the memory is as it was")
        # Not as if the server were full: clients ask again by themselves then, and read in vain once more.
        raise UsageError(
            f"prompt: {end.read} of {prompt} tokens were read when the time was up; the memory is as it was. "
            f"Give less, or more timeout, up to {self._service.settings.max_seconds:g} seconds"
        )

    async def commit(self) -> Memory | None:
        """Let the memory go on to where the session stands, saved if that was asked for."""
        if self._key is None:
            return None
        metrics = self._service.metrics
        memories, session = self._service.memories, self._sessions[0]
        self._commit = asyncio.ensure_future(
            run_in_threadpool(memories.commit, self._key, session, self._asked.save)
        )
        try:
            described = await asyncio.shield(self._commit)
        except ConflictError:
            metrics.conflicts.inc()
            raise
        metrics.saves.inc(described.saved)
        return Memory(**asdict(described))

    def usage(self) -> Usage:
        """Tokens seen so far."""
        read = sum(end.read for end in self._ends.values())
        drawn = sum(end.drawn for end in self._ends.values())
        return Usage(prompt_tokens=read, completion_tokens=drawn, total_tokens=read + drawn)

    def completion(self, choices: list[Choice]) -> Completion:
        """An answer, or a part of one."""
        return Completion(id=self.id, created=self.created, model=self._service.name, choices=choices)


class Answer:
    """One choice of a whole answer, as its parts come; what is there is added to, and not made anew."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._texts: list[str] = []
        self._logprobs: Logprobs | None = None
        self._reason: str | None = None

    def add(self, text: str, logprobs: Logprobs | None, reason: str | None) -> None:
        """The next part, which is not used again."""
        self._texts.append(text)
        self._reason = reason
        one = self._logprobs
        if one is None or logprobs is None:
            self._logprobs = one or logprobs
            return
        one.tokens.extend(logprobs.tokens)
        one.token_logprobs.extend(logprobs.token_logprobs)
        one.text_offset.extend(logprobs.text_offset)
        if one.top_logprobs is None:
            one.top_logprobs = logprobs.top_logprobs
        else:
            one.top_logprobs.extend(logprobs.top_logprobs or [])

    def choice(self, row: int) -> Choice:
        """The whole."""
        text = "".join(self._texts)
        return Choice(text=text, index=row, logprobs=self._logprobs, finish_reason=self._reason)


async def whole(running: Running) -> Completion:
    """The whole answer at once."""
    answers: dict[int, Answer] = {}
    async for parts in running.parts():
        for row, text, logprobs, reason in parts:
            answers.setdefault(row, Answer()).add(text, logprobs, reason)
    memory = await running.commit()
    choices = [answer.choice(row) for row, answer in sorted(answers.items())]
    return running.completion(choices).model_copy(update={"usage": running.usage(), "memory": memory})


async def streamed(running: Running, with_usage: bool) -> AsyncIterator[Completion]:
    """The answer in parts; the end of a memory's comes when the memory is kept."""
    held: list[Choice] = []
    async for parts in running.parts():
        choices = [
            Choice(text=text, index=row, logprobs=logprobs, finish_reason=reason)
            for row, text, logprobs, reason in parts
        ]
        held += [choice for choice in choices if choice.finish_reason]
        open_ones = [choice for choice in choices if not choice.finish_reason]
        if open_ones:
            yield running.completion(open_ones)
    memory = await running.commit()
    yield running.completion(held).model_copy(update={"memory": memory})
    if with_usage:
        yield running.completion([]).model_copy(update={"usage": running.usage()})


async def gone(receive: Any) -> None:  # noqa: ANN401 - ASGI's
    """Return when the caller has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
