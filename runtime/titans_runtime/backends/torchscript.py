"""Graphs in PyTorch's formats. Torch is imported when a bundle is opened with such a backend, not before."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from titans_runtime.backends import ON_HOST, Array, Call, Graph, Residence
from titans_runtime.backends.lengths import open_lengths
from titans_runtime.backends.placement import Placement
from titans_runtime.bundle import Bundle
from titans_runtime.errors import BundleError, EnvironmentProblem
from titans_runtime.manifest import GraphSpec, Manifest
from titans_runtime.optional import optional_import
from titans_runtime.quiet import quiet

Function = Callable[..., Sequence[Any]]
"""Tensors in the order of a graph's inputs → tensors in the order of its outputs."""


class TorchScriptBackend:
    """Runs a bundle's ``torchscript/*.pt`` on the CPU."""

    format: ClassVar = "torchscript"
    """Of the files, as the manifest names it; also the backend's name."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Import torch, load the graph ``model``.

        Args:
            bundle: opened bundle.
            threads: threads within an operator, of all PyTorch in this process; default is PyTorch's choice.

        Raises:
            EnvironmentProblem: PyTorch is missing, or code was compiled for another processor.
            BundleError: the bundle was exported without this format, or a file was altered.
        """
        self._torch = optional_import("torch", "torch")
        self._bundle = bundle
        if threads is not None:
            self._torch.set_num_threads(threads)
        self._graphs: dict[str, Graph] = {}
        self._lock = threading.Lock()
        self.graph("model")

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of its graphs."""
        return self._bundle.manifest

    @property
    def residence(self) -> Residence:
        """Bound arrays are the host's own."""
        return ON_HOST

    @property
    def placements(self) -> dict[str, Placement | None]:
        """None: PyTorch has no execution providers."""
        return {}

    def graph(self, name: str) -> Graph:
        """The graph of that name, loaded when first asked for.

        Raises:
            BundleError: the bundle has no such graph in this format, or it is damaged.
        """
        with self._lock:
            if name not in self._graphs:
                self._graphs[name] = self._open(name)
            return self._graphs[name]

    def _open(self, name: str) -> Graph:
        spec = self.manifest.graphs.get(name)
        if spec is None or self.format not in spec.formats:
            raise BundleError(
                f"{self._bundle.folder}: no graph {name!r} for {self.format}; "
                f"export it with --format {self.format}"
            )
        return open_lengths(spec, self._read, self.format)

    def _read(self, file: str, spec: GraphSpec) -> Graph:
        content = self._bundle.read(file)
        try:
            with quiet():  # TorchScript's deprecation is said once, in the documentation
                function = self._load(content, spec)
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"{self._bundle.folder / file}: {error}") from None
        except Exception as error:  # noqa: BLE001 - torch raises whatever its readers do
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{self._bundle.folder / file}: cannot be loaded ({reason})") from None
        return TorchGraph(self._torch, function, spec)

    def _load(self, content: bytes, spec: GraphSpec) -> Function:
        """The function in the content of a file that holds ``spec``."""
        del spec
        module = self._torch.jit.load(io.BytesIO(content), map_location="cpu")
        frozen: Function = self._torch.jit.freeze(module.eval())
        return frozen


class TorchGraph:
    """One loaded graph."""

    def __init__(self, torch: Any, function: Function, spec: GraphSpec) -> None:  # noqa: ANN401 - a module
        """``function``: tensors in the order of ``spec``."""
        self._torch, self._function, self._spec = torch, function, spec

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`titans_runtime.backends.Graph.bind`. Inputs are not copied, outputs are."""
        for array in (*inputs.values(), *outputs.values()):
            if not array.flags.c_contiguous:
                raise ValueError("only C-contiguous arrays can be bound")
        given = [self._torch.from_numpy(inputs[tensor.name]) for tensor in self._spec.inputs]
        places = {tensor.name: place for place, tensor in enumerate(self._spec.outputs)}
        wanted = [(places[name], array) for name, array in outputs.items()]
        return TorchCall(self._torch, self._function, given, wanted)


class TorchCall:
    """A graph with its inputs as tensors over memory of ours."""

    def __init__(
        self,
        torch: Any,  # noqa: ANN401 - a module
        function: Function,
        inputs: Sequence[Any],
        outputs: Sequence[tuple[int, Array]],
    ) -> None:
        """``outputs``: places among the results, and where they go."""
        self._torch, self._function = torch, function
        self._inputs, self._outputs = inputs, outputs

    def run(self) -> None:
        """Run the graph on the bound buffers."""
        try:
            with self._torch.no_grad():  # inference mode keeps nothing that the gradient graphs need
                results = self._function(*self._inputs)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            raise BundleError(f"a graph does not fit what it is given; export again ({reason})") from None
        for place, array in self._outputs:
            np.copyto(array, results[place].numpy())
