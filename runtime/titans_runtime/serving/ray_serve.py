"""The same application on Ray Serve: replicas on many machines that share a store.

    serve run titans_runtime.serving.ray_serve:application bundle=/models/nano store=redis://host/0 replicas=4

or the same in Serve's configuration, where the deployment ``Titans`` is scaled like any other. A memory is in
the store between two requests, so that any replica continues it; within a request it is in one replica's
hands, and where two replicas hold one version, the second to save is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from titans_runtime.errors import UsageError
from titans_runtime.optional import optional_import
from titans_runtime.serving.settings import Settings

_SPARE = 15
"""Seconds that Serve waits beyond what requests have to end: for memories to be saved."""


def application(args: Mapping[str, Any]) -> Any:  # noqa: ANN401 - Serve's application
    """An application for ``serve.run``, ``serve run`` and Serve's configuration files.

    Args:
        args: fields of :class:`Settings`, numbers also as text; and ``replicas``, 1 if left out.

    Raises:
        EnvironmentProblem: Ray is not installed.
        UsageError: a field is unknown, or a value out of range.
    """
    serve = optional_import("ray.serve", "ray")
    given = {name: value for name, value in args.items() if name != "replicas"}
    settings = Settings.from_dict({name: _read(name, value) for name, value in given.items()})
    replicas = _number("replicas", args.get("replicas", 1), int)

    def build() -> Any:  # noqa: ANN401 - an ASGI application
        from titans_runtime.serving.app import create_app

        return create_app(settings)

    @serve.deployment(
        name="Titans",
        num_replicas=replicas,
        max_ongoing_requests=settings.slots + settings.waiting,
        graceful_shutdown_timeout_s=settings.drain + _SPARE,
    )
    @serve.ingress(build)
    class Titans:
        """A replica."""

    return Titans.bind()  # type: ignore[attr-defined]


def _read(name: str, value: Any) -> Any:  # noqa: ANN401
    """A setting that ``serve run`` may have given as text."""
    default = {item.name: item.default for item in fields(Settings)}.get(name)
    kind = int if name == "threads" else type(default)
    return _number(name, value, kind) if isinstance(value, str) and kind in (int, float) else value


def _number(name: str, value: Any, kind: type) -> Any:  # noqa: ANN401
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise UsageError(f"setting {name} is {value!r}; it must be a number") from None
