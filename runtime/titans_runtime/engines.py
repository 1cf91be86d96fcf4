"""TensorRT engines on disk: what each was built for, and where they are kept.

An engine fits one bundle, one GPU and one version of TensorRT, so it is no part of a bundle. It lies in a
cache, beside a description by which it is found. Whoever can write there can run code: keep it yours.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from titans_runtime.errors import DataError
from titans_runtime.files import write_atomically
from titans_runtime.json_reader import canonical, parse_object

CACHE_VARIABLE: Final = "TITANS_CACHE"
DECODE, PREFILL = 0, 1
"""Optimization profiles: one token; and any number up to a segment."""
_ENGINE, _DESCRIPTION = ".engine", ".json"


@dataclass(frozen=True)
class Target:
    """What an engine is built for.

    Attributes:
        bundle: identity of the bundle.
        gpu: name of the device, as CUDA gives it.
        capability: compute capability, ``"9.0"``.
        tensorrt: version.
        max_batch: streams in one call, at most.
        max_tokens: tokens in one call, at most.
        tf32: whether products may be rounded to TF32.
    """

    bundle: str
    gpu: str
    capability: str
    tensorrt: str
    max_batch: int
    max_tokens: int
    tf32: bool

    @property
    def key(self) -> str:
        """Name of its files."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()[:32]


@dataclass(frozen=True)
class Engine:
    """An engine in the cache.

    Attributes:
        target: what it was built for.
        plugins: memory layers that are plugins.
        bodies: memory layers that TensorRT built from their function bodies.
        sha256: of the engine's bytes.
        path: of its file.
    """

    target: Target
    plugins: int
    bodies: int
    sha256: str
    path: Path

    def read(self) -> bytes:
        """The serialized engine.

        Raises:
            DataError: the file is missing or is not what its description says.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); build it again") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"{self.path}: altered since it was built; remove it and build it again")
        return content


def cache_folder() -> Path:
    """``$TITANS_CACHE``, or ``titans`` in the user's cache."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "titans" / "engines"


def find_engine(target: Target, folder: Path | None = None) -> Engine | None:
    """The engine of exactly this target, or None.

    Raises:
        DataError: its description is damaged.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / f"{target.key}{_DESCRIPTION}"
    return _read(path) if path.exists() else None


def engines_of(bundle: str, gpu: str, tensorrt: str, folder: Path | None = None) -> list[Engine]:
    """All engines of a bundle that this GPU and this TensorRT can run; those of most streams first.

    Raises:
        DataError: a description is damaged.
    """
    folder = cache_folder() if folder is None else folder
    found = [_read(path) for path in sorted(folder.glob(f"*{_DESCRIPTION}"))]
    fitting = [
        engine
        for engine in found
        if (engine.target.bundle, engine.target.gpu, engine.target.tensorrt) == (bundle, gpu, tensorrt)
    ]
    return sorted(fitting, key=lambda engine: (engine.target.tf32, -engine.target.max_batch))


def store_engine(
    target: Target, content: bytes, plugins: int, bodies: int, folder: Path | None = None
) -> Engine:
    """Write an engine, and its description last.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{target.key}{_ENGINE}"
    engine = Engine(target, plugins, bodies, hashlib.sha256(content).hexdigest(), path)
    write_atomically(path, content)
    described = {"target": asdict(target), "plugins": plugins, "bodies": bodies, "sha256": engine.sha256}
    write_atomically(path.with_suffix(_DESCRIPTION), (json.dumps(described, indent=1) + "\n").encode())
    return engine


def _read(path: Path) -> Engine:
    try:
        content = parse_object(path.read_bytes(), path.name)
        target = Target(**content["target"])
        if any(type(getattr(target, field.name)).__name__ != field.type for field in fields(Target)):
            raise TypeError("a field of target has another type")
        engine = path.with_suffix(_ENGINE)
        return Engine(target, int(content["plugins"]), int(content["bodies"]), str(content["sha256"]), engine)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no description of an engine ({error}); remove it") from None
