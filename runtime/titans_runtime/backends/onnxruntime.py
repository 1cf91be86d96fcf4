"""Graphs in ONNX Runtime: on the CPU in buffers of ours, without a copy; on a device in twins of them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans_runtime.backends import ON_HOST, Array, Call, Graph, Residence
from titans_runtime.backends.lengths import open_lengths
from titans_runtime.backends.mirror import Mirrors, is_state, whole
from titans_runtime.backends.pages import Memory, noted
from titans_runtime.backends.placement import RECORD, Placement, check_placement, read_placement
from titans_runtime.bundle import WEIGHTS_NAME, Bundle
from titans_runtime.errors import BundleError, EnvironmentProblem, TitansError, UsageError

if TYPE_CHECKING:
    import onnxruntime

    from titans_runtime.manifest import GraphSpec, Manifest

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int64": "tensor(int64)"}
DEFAULT_PROVIDERS = ("CPUExecutionProvider",)
# TF32 rounds products to 10 bits, which the goldens' tolerance does not allow; CUDA's provider has it on.
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_NOWHERE = "/no-files-but-those-given"
_CAN_MAP = sys.platform == "linux"
_MAPPED_FROM = 2**24  # bytes; below, time stamps might be too coarse to tell that a file has changed
_QUIET = 4  # what it has to say comes as an exception, too, which is said in a line of ours
_WARNINGS = 2  # where that of the whole process stands
_NEWER = ("max supported IR version", "Current official support")  # how it refuses a file from its future


class OnnxRuntimeBackend:
    """Runs a bundle's graphs in ``onnxruntime``."""

    def __init__(
        self,
        bundle: Bundle,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        device: str | None = None,
        first: str = "model",
    ) -> None:
        """Check the environment, load the first graph.

        Args:
            bundle: opened bundle.
            providers: execution providers by preference; default is the CPU's. Never falls back silently:
                where the CPU is not among them, only sizes and indices may be computed there.
            threads: threads within an operator; default is ONNX Runtime's choice.
            device: of ONNX Runtime's memory, where the state stays between calls; default is that of the
                first provider, or none: then graphs run on the arrays themselves.
            first: name of the graph to load at once; others are loaded when asked for.

        Raises:
            EnvironmentProblem: ONNX Runtime is missing or too old, or a provider is not available.
            BundleError: a file was altered, or a graph is not loadable.
        """
        self._ort = _import_onnxruntime()
        self._bundle = bundle
        self._providers = _checked_providers(self._ort, providers)
        self._threads = threads
        self._placements: dict[str, Placement | None] = {}
        chosen = _DEVICES.get(self._providers[0]) if device is None else device
        self._mirrors = None if chosen is None else Mirrors(_OrtDevice(self._ort, chosen))
        _check_version(self._ort.__version__, bundle.manifest.requires["onnxruntime"])
        self._graphs: dict[str, Graph] = {}
        self._lock = threading.Lock()
        self.graph(first)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of its graphs."""
        return self._bundle.manifest

    @property
    def residence(self) -> Residence:
        """Where bound arrays are."""
        return ON_HOST if self._mirrors is None else self._mirrors

    @property
    def placements(self) -> dict[str, Placement | None]:
        """For every loaded graph: provider → operator → nodes; None where ONNX Runtime cannot say."""
        return dict(self._placements)

    def graph(self, name: str) -> Graph:
        """The graph of that name, loaded when first asked for.

        Raises:
            BundleError: the bundle has no such graph, or it is damaged.
        """
        with self._lock:
            if name not in self._graphs:
                self._graphs[name] = self._open(name)
            return self._graphs[name]

    def _open(self, name: str) -> Graph:
        spec = self._bundle.manifest.graphs.get(name)
        if spec is None:
            known = ", ".join(self._bundle.manifest.graphs)
            raise BundleError(f"{self._bundle.folder}: no graph {name!r}; it has {known}")
        # The editor works on the host: what a gradient graph reads and writes is copied every time.
        mirrors = self._mirrors if name == "model" else None

        def load(file: str, form: GraphSpec) -> Graph:
            label = name if file == spec.file else Path(file).stem
            session, memory = self._load(file, form, label)
            return OnnxRuntimeGraph(self._ort, session, memory, mirrors)

        return open_lengths(spec, load)

    def _load(self, file: str, spec: GraphSpec, name: str) -> tuple[onnxruntime.InferenceSession, Memory]:
        memory = Memory()
        options = self._ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Threads that spin while they wait keep cores busy between tokens, and beside other work more
        # than halved the speed of prefill with two threads on two cores; decode was the same.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(RECORD, "1")
        graph = self._bundle.read(file)
        with contextlib.ExitStack() as until_loaded:
            if WEIGHTS_NAME.encode() in graph:
                self._give_weights(options, memory, until_loaded)
            else:
                options.add_session_config_entry(_DATA_FOLDER, _NOWHERE)
            until_loaded.enter_context(_quiet_start(self._ort, self._providers))
            try:
                session = self._ort.InferenceSession(
                    graph, options, providers=_with_options(self._providers), enable_fallback=0
                )
            except Exception as error:  # noqa: BLE001 - onnxruntime has no public base class for its errors
                raise self._refusal(self._bundle.folder / file, str(error)) from None
        _check_fallback(session.get_providers(), self._providers)
        _check_interface(session, spec, self._bundle.folder / file)
        self._placements[name] = read_placement(session)
        check_placement(self._placements[name], self._providers, name)
        return session, memory

    def _give_weights(
        self, options: onnxruntime.SessionOptions, memory: Memory, until_loaded: contextlib.ExitStack
    ) -> None:
        """Let a graph find the bundle's weights, and nothing else: it would look in the working directory.

        Large ones are not read but mapped by ONNX Runtime, which lays matrices out anew, page by page: two
        copies and a half in memory become one. Small ones are given as verified bytes.
        """
        listed = self._bundle.manifest.files.get(WEIGHTS_NAME)
        if _CAN_MAP and listed and listed.size >= _MAPPED_FROM:
            until_loaded.enter_context(noted(memory))
            until_loaded.enter_context(self._bundle.hold(WEIGHTS_NAME))
            # By descriptor: whatever is renamed, this is the folder. ONNX Runtime refuses paths out of it.
            folder = os.open(self._bundle.folder, os.O_RDONLY | os.O_DIRECTORY)
            until_loaded.callback(os.close, folder)
            options.add_session_config_entry(_DATA_FOLDER, f"/proc/self/fd/{folder}")
            return
        weights = self._bundle.read(WEIGHTS_NAME)
        options.add_session_config_entry(_DATA_FOLDER, _NOWHERE)
        options.add_external_initializers_from_files_in_memory([WEIGHTS_NAME], [weights], [len(weights)])
        until_loaded.enter_context(contextlib.nullcontext(weights))  # the options hold no reference

    def _refusal(self, path: Path, message: str) -> TitansError:
        """ONNX Runtime's own words, which may be many lines, as one of ours."""
        reason = " ".join(message.split())
        if any(words in reason for words in _NEWER):
            requires = self._bundle.manifest.requires
            return EnvironmentProblem(
                f"{path}: needs opset {requires['opset']} and IR version {requires['ir_version']}, which are "
                f"newer than onnxruntime {self._ort.__version__}; upgrade onnxruntime"
            )
        if self._providers != DEFAULT_PROVIDERS and "rovider" in reason:
            return EnvironmentProblem(
                f"providers {list(self._providers)} cannot start on this machine ({reason}); "
                "install their libraries, or choose another provider"
            )
        return BundleError(f"{path}: cannot be loaded ({reason})")


class OnnxRuntimeGraph:
    """One loaded graph."""

    def __init__(
        self,
        ort: Any,  # noqa: ANN401 - a module
        session: onnxruntime.InferenceSession,
        memory: Memory,
        mirrors: Mirrors | None = None,
    ) -> None:
        """``session``: already checked against the manifest; ``mirrors``: of arrays that have twins."""
        self._ort, self._session, self._memory, self._mirrors = ort, session, memory, mirrors

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`titans_runtime.backends.Graph.bind`; on the host no array is copied."""
        if self._mirrors is None:
            return OnnxRuntimeCall(self._ort, self._session, self._memory, inputs, outputs)
        return OnnxRuntimeDeviceCall(self._session, self._mirrors, inputs, outputs)


class OnnxRuntimeCall:
    """A graph with every input and output bound to memory of ours."""

    def __init__(
        self,
        ort: Any,  # noqa: ANN401 - a module
        session: onnxruntime.InferenceSession,
        memory: Memory,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
    ) -> None:
        """Wrap the arrays as OrtValues, which share their memory. ``memory``: the session's own."""
        self._session, self._memory = session, memory
        self._binding = session.io_binding()
        self._values: list[Any] = []  # kept: the binding holds no reference to them
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._value(ort, array))
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, self._value(ort, array))

    def run(self) -> None:
        """Run the graph on the bound buffers."""
        _run(self._session, self._binding)
        self._memory.used()

    def _value(self, ort: Any, array: Array) -> Any:  # noqa: ANN401 - onnxruntime.OrtValue
        if not array.flags.c_contiguous:
            raise ValueError("only C-contiguous arrays can be bound")
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._values.append(value)
        return value


class OnnxRuntimeDeviceCall:
    """A graph whose state stays on the device: what a call writes there, the next one reads there.

    Tokens, edit strengths and results are copied, as are views of larger arrays.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        mirrors: Mirrors,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
    ) -> None:
        """Bind the twins."""
        self._session, self._mirrors = session, mirrors
        self._binding = session.io_binding()
        device = mirrors.device
        kept = {name: array for name, array in ({**inputs, **outputs}).items() if _stays(name, array)}
        self._past = [mirrors.of(array) for name, array in inputs.items() if name in kept]
        self._present = [mirrors.of(array) for name, array in outputs.items() if name in kept]
        self._given = [(device.allocate(a), a) for name, a in inputs.items() if name not in kept]
        self._results = [(device.allocate(a), a) for name, a in outputs.items() if name not in kept]
        given, results = iter(self._given), iter(self._results)
        for name, array in inputs.items():
            twin = mirrors.of(array).twin if name in kept else next(given)[0]
            self._binding.bind_ortvalue_input(name, twin)
        for name, array in outputs.items():
            twin = mirrors.of(array).twin if name in kept else next(results)[0]
            self._binding.bind_ortvalue_output(name, twin)

    def run(self) -> None:
        """Copy what is new on the host, run, and copy the results; the state stays."""
        device = self._mirrors.device
        for mirror in self._past:
            mirror.to_device()
        for twin, array in self._given:
            self._mirrors.fetch((array,))
            device.upload(twin, array)
        _run(self._session, self._binding)
        for mirror in self._present:
            mirror.written_by_device()
        for twin, array in self._results:
            self._mirrors.fetch((array,))
            device.download(twin, array)
            self._mirrors.changed((array,))


def _stays(name: str, array: Array) -> bool:
    """Whether an array's twin is the one that counts. One that the model only reads may be a view, too."""
    return is_state(name) and whole(array) is array


class _OrtDevice:
    """Memory that ONNX Runtime allocates."""

    def __init__(self, ort: Any, name: str) -> None:  # noqa: ANN401 - a module
        self._ort, self._name = ort, name

    def allocate(self, like: Array) -> Any:  # noqa: ANN401 - onnxruntime.OrtValue
        """See :class:`titans_runtime.backends.mirror.Device`."""
        return self._ort.OrtValue.ortvalue_from_shape_and_type(like.shape, like.dtype, self._name, 0)

    def upload(self, twin: Any, array: Array) -> None:  # noqa: ANN401
        """See :class:`titans_runtime.backends.mirror.Device`."""
        twin.update_inplace(array)

    def download(self, twin: Any, array: Array) -> None:  # noqa: ANN401
        """See :class:`titans_runtime.backends.mirror.Device`."""
        np.copyto(array, twin.numpy())


def _run(session: onnxruntime.InferenceSession, binding: Any) -> None:  # noqa: ANN401
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # noqa: BLE001 - onnxruntime has no public base class for its errors
        reason = " ".join(str(error).split())
        if "nvalid" in reason:
            raise BundleError(f"a graph does not fit what it is given; export again ({reason})") from None
        raise EnvironmentProblem(f"onnxruntime could not run the graph ({reason})") from None


def _import_onnxruntime() -> Any:  # noqa: ANN401 - a module
    try:
        import onnxruntime
    except ImportError:
        raise EnvironmentProblem(
            "onnxruntime is not installed; pip install 'titans-runtime[cpu]' (or [gpu], never both)"
        ) from None
    return onnxruntime


def _checked_providers(ort: Any, providers: Sequence[str] | None) -> tuple[str, ...]:  # noqa: ANN401
    if isinstance(providers, str):
        raise UsageError(f"providers is the string {providers!r}; give a list of names")
    wanted = tuple(providers) if providers is not None else DEFAULT_PROVIDERS
    available = ort.get_available_providers()
    for name in wanted:
        if name not in available:
            raise EnvironmentProblem(
                f"provider {name!r} is not available here; this onnxruntime has {', '.join(available)}"
            )
    if not wanted:
        raise EnvironmentProblem(f"no provider given; this onnxruntime has {', '.join(available)}")
    return wanted


@contextlib.contextmanager
def _quiet_start(ort: Any, providers: Sequence[str]) -> Iterator[None]:  # noqa: ANN401 - a module
    """A provider that cannot start says so at length, by a logger of the whole process; we say it once."""
    if tuple(providers) == DEFAULT_PROVIDERS:
        yield
        return
    ort.set_default_logger_severity(_QUIET)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_WARNINGS)


def _with_options(providers: Sequence[str]) -> list[str | tuple[str, dict[str, str]]]:
    return [(name, _OPTIONS[name]) if name in _OPTIONS else name for name in providers]


def _check_fallback(loaded: Sequence[str], wanted: Sequence[str]) -> None:
    """ONNX Runtime goes on without a provider whose libraries it cannot load."""
    for name in wanted:
        if name not in loaded:
            raise EnvironmentProblem(
                f"provider {name!r} cannot start on this machine, only {', '.join(loaded)}; "
                "install its libraries, or choose another provider"
            )


def _check_version(installed: str, required: str) -> None:
    def parts(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())

    if parts(installed) < parts(required):
        raise EnvironmentProblem(
            f"onnxruntime {installed} is too old for this bundle; install {required} or newer"
        )


def _check_interface(session: onnxruntime.InferenceSession, spec: GraphSpec, path: Path) -> None:
    for kind, found, stated in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        if {value.name for value in found} != {tensor.name for tensor in stated}:
            raise BundleError(f"{path}: its {kind} are not those that titans.json states; export again")
        types = {value.name: (value.type, value.shape) for value in found}
        for tensor in stated:
            kind_found, shape = types[tensor.name]
            if kind_found != _TYPES[tensor.dtype] or not _may_be(shape, tensor.shape):
                raise BundleError(
                    f"{path}: {tensor.name} is {kind_found} {shape}, not "
                    f"{tensor.dtype} {list(tensor.shape)} as titans.json states; export again"
                )


def _may_be(found: Sequence[Any], stated: Sequence[int | str]) -> bool:
    """Whether a shape with free axes can be the stated one."""
    return len(found) == len(stated) and all(
        a == b for a, b in zip(found, stated, strict=True) if isinstance(a, int) and isinstance(b, int)
    )
