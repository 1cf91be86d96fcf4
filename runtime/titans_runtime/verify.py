"""Replaying a bundle's goldens: does this machine compute what the exporter's reference computed?"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_arrays

from titans_runtime.backends import DTYPES, Array, Arrays, Backend
from titans_runtime.backends.choose import open_backend
from titans_runtime.backends.placement import Placement, placement_lines
from titans_runtime.bundle import GOLDENS_NAME, Bundle, initial_state, open_bundle
from titans_runtime.errors import BundleError, CheckFailed, TitansError, UsageError
from titans_runtime.manifest import IDS, VECTORS, GraphSpec, TensorSpec


@dataclass(frozen=True)
class Check:
    """One output of one call.

    Attributes:
        name: ``<case>.<graph>.<call>.<tensor>``.
        error: largest absolute difference.
        limit: largest allowed: ``atol + rtol · max |expected|``; 0 for integers.
    """

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return bool(self.error <= self.limit)

    def line(self) -> str:
        """The check as a line for people."""
        mark = "✓" if self.passed else "✗"
        return f"{mark} {self.name:<52} error {self.error:.2e}, limit {self.limit:.2e}"


@dataclass(frozen=True)
class VerificationReport:
    """All checks of a bundle, and for every graph which provider ran how many nodes."""

    checks: tuple[Check, ...]
    placements: Mapping[str, Placement | None] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def lines(self) -> list[str]:
        """One line a check, and a closing one."""
        lines = [check.line() for check in self.checks]
        failed = sum(not check.passed for check in self.checks)
        total = len(self.checks)
        lines += [line for name, one in self.placements.items() for line in placement_lines(one, name)]
        return [*lines, f"FAILED: {failed} of {total} outputs" if failed else f"PASSED: {total} outputs"]

    def raise_if_failed(self) -> None:
        """Turn a failed check into an error.

        Raises:
            CheckFailed: names the first output that failed.
        """
        if not self.passed:
            worst = next(check for check in self.checks if not check.passed)
            raise CheckFailed(
                f"verification failed: {worst.name} is off by {worst.error:.2e}, limit {worst.limit:.2e}"
            )


def verify(
    folder: str | Path,
    atol: Mapping[str, float] | None = None,
    rtol: float | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    backend: str = "onnxruntime",
) -> VerificationReport:
    """Replay every golden of a bundle.

    Args:
        folder: the bundle.
        atol: absolute tolerance by output name; the name ``""`` sets it for all outputs not named.
        rtol: tolerance relative to the largest expected value of the output.
        providers: see :func:`titans_runtime.load`.
        threads: likewise.
        backend: likewise.

    Raises:
        BundleError: the bundle or its goldens are damaged.
        UsageError: ``atol`` names an output that the bundle does not have, or a tolerance is no
            number from 0 on.
    """
    bundle = open_bundle(folder)
    tolerances = bundle.manifest.tolerances
    limits = {"": tolerances["atol"], **(atol or {})}
    relative = tolerances["rtol"] if rtol is None else rtol
    for tolerance in (*limits.values(), relative):
        if not 0 <= tolerance < np.inf:
            raise UsageError(f"tolerance {tolerance}: it must be a finite number, 0 or more")
    opened = open_backend(backend, bundle, providers, threads)
    checks = []
    known = {tensor.name for graph in bundle.manifest.graphs.values() for tensor in graph.outputs}
    for name in limits.keys() - known - {""}:
        raise UsageError(f"atol for {name!r}: no such output; the bundle has {', '.join(sorted(known))}")
    graphs = bundle.manifest.graphs
    others = {
        name for name in graphs if backend in graphs["model"].formats and backend not in graphs[name].formats
    }
    for name, actual, expected in _checked_replay(bundle, opened, others):
        tensor = name.split(".", 3)[-1] if ".gradient." not in name else name.split(".", 4)[-1]
        exact = expected.dtype.kind in "iu"
        scale = float(np.abs(expected).max(initial=0))
        limit = 0.0 if exact else limits.get(tensor, limits[""]) + relative * scale
        checks.append(Check(name, _difference(actual, expected), limit))
    if not checks:
        raise BundleError(f"{bundle.folder}: {GOLDENS_NAME} holds no expected outputs; export again")
    return VerificationReport(tuple(checks), opened.placements)


def _checked_replay(
    bundle: Bundle, backend: Backend, others: Container[str]
) -> Iterator[tuple[str, Array, Array]]:
    """Replay; goldens whose names or shapes do not fit the graphs are a damaged bundle."""
    try:
        yield from _replay(bundle, backend, others)
    except TitansError as error:
        if str(bundle.folder) in str(error) or not isinstance(error, BundleError):
            raise
        raise BundleError(f"{bundle.folder / GOLDENS_NAME}: {error}") from None
    except Exception as error:  # noqa: BLE001 - onnxruntime has no public base class for its errors
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{bundle.folder / GOLDENS_NAME}: does not fit the graphs ({type(error).__name__}: {reason})"
        ) from None


def _difference(actual: Array, expected: Array) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))


def _replay(bundle: Bundle, backend: Backend, others: Container[str]) -> Iterator[tuple[str, Array, Array]]:
    """Yield the name, the computed and the expected value of every golden output.

    ``others``: graphs that the backend's format does not hold.
    """
    try:
        goldens: Arrays = load_arrays(bundle.read(GOLDENS_NAME))
    except BundleError:
        raise
    except Exception as error:  # noqa: BLE001 - safetensors raises a type of its own
        raise BundleError(f"{bundle.folder / GOLDENS_NAME}: damaged ({error})") from None
    initial = {f"past.{name}": array for name, array in initial_state(bundle).items()}
    graphs = sorted({_case_and_graph(name) for name in goldens})
    for case, graph in graphs:
        if graph in others:
            continue
        spec = bundle.manifest.graphs[graph]
        carried: Arrays = {}
        call = 0
        while _sequence(_part(goldens, f"{case}.{graph}.{call}.input.")) is not None:
            prefix = f"{case}.{graph}.{call}."
            inputs = _part(goldens, f"{prefix}input.")
            outputs = _run(backend, spec, graph, inputs, carried, initial)
            for name, expected in _part(goldens, f"{prefix}output.").items():
                yield prefix + name, outputs[name], expected
            carried |= {name: array for name, array in inputs.items() if name.startswith("past.")}
            carried |= {
                name.replace("present.", "past.", 1): array
                for name, array in outputs.items()
                if name.startswith("present.")
            }
            call += 1


def _case_and_graph(name: str) -> tuple[str, str]:
    case, *rest = name.split(".")
    graph = ".".join(rest[:2]) if rest[0] == "gradient" else rest[0]
    return case, graph


def _sequence(given: Arrays) -> Array | None:
    """What has an axis of tokens: every call has it."""
    return given.get(IDS, given.get(VECTORS))


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _run(
    backend: Backend, spec: GraphSpec, graph: str, given: Arrays, carried: Arrays, initial: Arrays
) -> Arrays:
    sequence = _sequence(given)
    assert sequence is not None
    batch, tokens = sequence.shape[:2]
    axes = {"batch": batch, "tokens": tokens}

    def buffer(tensor: TensorSpec) -> Array:
        shape = tuple(axes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
        array: Array = np.zeros(shape, DTYPES[tensor.dtype])
        if tensor.name in initial:
            array[:] = initial[tensor.name]
        return array

    inputs = {}
    for tensor in spec.inputs:
        value = given.get(tensor.name, carried.get(tensor.name))
        inputs[tensor.name] = buffer(tensor) if value is None else np.ascontiguousarray(value)
    outputs = {tensor.name: buffer(tensor) for tensor in spec.outputs}
    backend.graph(graph).bind(inputs, outputs).run()
    backend.residence.fetch(outputs.values())
    return outputs
