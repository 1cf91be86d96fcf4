"""The command ``titans serve``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from titans_runtime.errors import EnvironmentProblem, UsageError
from titans_runtime.optional import optional_import
from titans_runtime.serving.settings import Settings, is_loopback, option

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from titans_runtime.serving.service import Service

_GRACE: Final = 1.0
"""Seconds for answers to leave, after a second Ctrl-C."""


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes, then let what is under way end, and save every memory; 1 if one is not."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        optional_import(module, "serve")
    settings = settings_of(args)
    if settings.tokens is None and not is_loopback(args.host):
        raise UsageError(
            f"--host {args.host}: others reach this address; give --tokens FILE, or serve on 127.0.0.1"
        )
    from titans_runtime.serving.app import create_app
    from titans_runtime.serving.service import Service

    with _listening(args.host, args.port) as listener:
        service = Service(settings)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"titans: serving {service.name} at http://{shown}:{port}, memories in {settings.store}; "
            "stop with Ctrl-C",
            file=sys.stderr,
            flush=True,
        )
        _ignore_impatience(service)
        try:
            asyncio.run(_run(create_app(settings, service), service, listener, args.access_log))
        finally:
            all_saved = service.close()  # once more: however the server has ended, nothing is lost
    return 0 if all_saved else 1


def settings_of(args: argparse.Namespace) -> Settings:
    """What the options say.

    Raises:
        UsageError: a value is out of range.
    """
    given = {item.name: getattr(args, item.name) for item in fields(Settings) if hasattr(args, item.name)}
    given["bundle"] = str(args.bundle)
    if args.tokens is not None:
        given["tokens"] = str(args.tokens)
    return Settings(**given)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command, with the defaults of :class:`Settings`."""
    default = {item.name: item.default for item in fields(Settings)}
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="address; default 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 chooses a free one")
    parser.add_argument(
        "--store",
        default=default["store"],
        metavar="FOLDER|URL",
        help="default ./memories; s3://…, redis://…",
    )
    parser.add_argument(
        "--tokens", type=Path, default=None, metavar="FILE", help="bearer tokens, one 'OWNER TOKEN' a line"
    )
    parser.add_argument(
        "--allow-host",
        default=default["allow_host"],
        metavar="NAME,…",
        help="without --tokens: names, besides this machine's own, that browsers may reach it by",
    )
    for name, kind, text in (
        ("slots", int, "requests that run at once"),
        ("waiting", int, "requests that wait at most"),
        ("max_body", int, "bytes of a request"),
        ("max_tokens", int, "tokens that a request draws at most"),
        ("max_seconds", float, "seconds that a request takes at most"),
        ("max_memories", int, "memories of one owner"),
        ("hot", int, "memories kept in RAM besides"),
        ("expire", float, "seconds after its last save when a memory is gone; 0 for never"),
        ("drain", float, "seconds for requests under way when the server is stopped"),
    ):
        parser.add_argument(
            option(name),
            type=kind,
            default=default[name],
            metavar="N",
            help=f"{text}; default {default[name]}",
        )
    parser.add_argument("--access-log", action="store_true", help="a line on stderr for every request")
    parser.add_argument("--backend", default=default["backend"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=None, metavar="N")


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        EnvironmentProblem: the address is taken, or is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = (
            os.strerror(error.errno)
            if isinstance(error, OSError) and error.errno and error.errno > 0
            else error
        )
        raise EnvironmentProblem(
            f"{host}:{port}: cannot be listened on ({reason}); choose another --port"
        ) from None


def _ignore_impatience(service: Service) -> None:
    """Let Ctrl-C interrupt nothing once the server closes: uvicorn gives signals back before that is done."""

    def interrupt(*_: object) -> None:
        if not service.is_closing:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


async def _run(app: ASGIApp, service: Service, listener: socket.socket, access_log: bool) -> None:
    uvicorn = optional_import("uvicorn", "serve")
    loop = asyncio.get_running_loop()

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        """What uvicorn cancels while the server closes is no error to be shown."""
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if not service.is_closing:
                raise

    class Server(uvicorn.Server):  # type: ignore[misc,name-defined,unused-ignore]
        """Begins to drain with the signal: streams then end, and with them the connections."""

        should_exit: bool

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
            if not self.should_exit:
                self.should_exit = service.is_closing = True
                print("titans: closing; requests under way end first", file=sys.stderr, flush=True)
                threading.Thread(target=service.drain, name="titans-drain").start()
            elif sig == signal.SIGINT:  # Ctrl-C again. uvicorn's own force_exit would not save memories
                loop.call_soon_threadsafe(self.hurry)

        def hurry(self) -> None:
            """End requests now, and soon the connections of those who do not read their answers."""
            service.hurry()
            loop.call_later(_GRACE, self.cut)

        def cut(self) -> None:
            for task in list(self.server_state.tasks):
                task.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    config = uvicorn.Config(
        quiet,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        timeout_graceful_shutdown=int(service.settings.drain) + 5,
        server_header=False,
    )
    await Server(config).serve(sockets=[listener])
