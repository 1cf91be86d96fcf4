"""Graphs for given numbers of tokens: a call takes the one for its own number, or is cut into such pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from titans_runtime.backends import DTYPES, Array, Arrays, Call, Graph
from titans_runtime.manifest import ONNX, GraphSpec, TensorSpec

_PAST, _PRESENT = "past.", "present."


def open_lengths(spec: GraphSpec, load: Callable[[str, GraphSpec], Graph], kind: str = ONNX) -> Graph:
    """A graph of a bundle in one format, with all that it has for given numbers of tokens.

    Args:
        spec: what the manifest says of it.
        load: loads a file, given its name and the tensors that it must have.
        kind: the format; the graph has a file of its own in it.
    """
    files = spec.files_by_length(kind)
    exact = {tokens: load(file, spec.at(tokens)) for tokens, file in sorted(files.items())}
    own = spec.own_file(kind)
    assert own is not None
    if not exact:
        return load(own, spec)
    return ByLength(spec, exact, load(own, spec) if spec.takes_any_length(kind) else None)


class ByLength:
    """A graph whose calls of some numbers of tokens have graphs of their own."""

    def __init__(self, spec: GraphSpec, exact: Mapping[int, Graph], other: Graph | None) -> None:
        """``exact``: by number of tokens; ``other``: for all other numbers, or None where calls are cut."""
        self._spec, self._exact, self._other = spec, exact, other
        self._sequence = next(tensor.name for tensor in spec.inputs if has_tokens(tensor))

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`titans_runtime.backends.Graph.bind`."""
        tokens = inputs[self._sequence].shape[1]
        graph = self._exact.get(tokens, self._other)
        if graph is not None:
            return graph.bind(inputs, outputs)
        return _InPieces(self._spec, self._exact, inputs, outputs, tokens)


class _InPieces:
    """A call as calls of fewer tokens, one after the other; the state between them stands in two sets."""

    def __init__(
        self,
        spec: GraphSpec,
        graphs: Mapping[int, Graph],
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        tokens: int,
    ) -> None:
        """Bind every piece."""
        streamed = {tensor.name for tensor in (*spec.inputs, *spec.outputs) if has_tokens(tensor)}
        pieces = list(cut(tokens, graphs))
        batch = next(inputs[name].shape[0] for name in inputs if name in streamed)
        sets = [_state(spec, batch) for _ in pieces[1:3]]
        self._steps: list[tuple[list[tuple[Array, Array]], Call, list[tuple[Array, Array]]]] = []
        start = 0
        for index, length in enumerate(pieces):
            part = slice(start, start + length)
            given, results = dict(inputs), dict(outputs)
            if index > 0:
                given |= {f"{_PAST}{name}": array for name, array in sets[(index - 1) % 2].items()}
            if index < len(pieces) - 1:
                results |= {f"{_PRESENT}{name}": array for name, array in sets[index % 2].items()}
            before = _narrowed(given, streamed, part)
            after = [(whole, own) for own, whole in _narrowed(results, streamed, part)]
            self._steps.append((before, graphs[length].bind(given, results), after))
            start = part.stop

    def run(self) -> None:
        """Run all pieces."""
        for before, call, after in self._steps:
            for target, source in before:
                np.copyto(target, source)
            call.run()
            for target, source in after:
                np.copyto(target, source)


def cut(tokens: int, lengths: Mapping[int, object]) -> Iterator[int]:
    """``tokens`` as a sum of ``lengths``, the longest first; 1 is among them."""
    for length in sorted(lengths, reverse=True):
        while tokens >= length:
            yield length
            tokens -= length


def has_tokens(tensor: TensorSpec) -> bool:
    """Whether a tensor's second axis counts tokens."""
    return tensor.shape[1:2] == ("tokens",)


def _state(spec: GraphSpec, batch: int) -> Arrays:
    """Room for the entries that the graph changes."""
    state = {}
    for tensor in spec.outputs:
        if tensor.name.startswith(_PRESENT):
            row = [axis for axis in tensor.shape[1:] if isinstance(axis, int)]
            state[tensor.name.removeprefix(_PRESENT)] = np.empty((batch, *row), DTYPES[tensor.dtype])
    return state


def _narrowed(arrays: Arrays, names: set[str], part: slice) -> list[tuple[Array, Array]]:
    """Let arrays show their ``part`` of the tokens; what is not contiguous is an array apart.

    Returns:
        The arrays apart, and the parts that they stand for.
    """
    apart = []
    for name in arrays.keys() & names:
        view = arrays[name][:, part]
        arrays[name] = view
        if not view.flags.c_contiguous:
            arrays[name] = np.empty(view.shape, view.dtype)
            apart.append((arrays[name], view))
    return apart
