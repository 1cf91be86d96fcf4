"""Graphs for given numbers of tokens: a call computes what one graph for any number would compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_runtime as tr
from titans_runtime.backends import Array, Arrays, Call
from titans_runtime.backends.lengths import ByLength, cut, open_lengths
from titans_runtime.manifest import GraphSpec, LengthSpec, TensorSpec

_SPEC = GraphSpec(
    "model.onnx",
    (
        TensorSpec("input_ids", "int64", ("batch", "tokens")),
        TensorSpec("past.sum", "int64", ("batch", 2)),
        TensorSpec("past.kept", "int64", ("batch", 1)),
    ),
    (
        TensorSpec("logits", "int64", ("batch", "tokens", 3)),
        TensorSpec("present.sum", "int64", ("batch", 2)),
    ),
)


class _Graph:
    """A recurrence whose order matters, for one number of tokens or, with 0, for any."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        arrays = dict(inputs) | dict(outputs)
        assert all(array.flags.c_contiguous for array in arrays.values())
        assert self.tokens in (0, inputs["input_ids"].shape[1])
        assert not any(
            np.shares_memory(inputs[f"past.{name}"], outputs[f"present.{name}"]) for name in ("sum",)
        )
        return _Recurrence(arrays)


class _Recurrence:
    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def run(self) -> None:
        total = self.arrays["past.sum"].copy()
        self.arrays["present.sum"][:] = -1  # what is read after this was not the past
        for t, token in enumerate(self.arrays["input_ids"].T):
            total = 3 * total % 1009 + token[:, None] + self.arrays["past.kept"]
            self.arrays["logits"][:, t] = total[:, :1] + [[0, 1, 2]]
        self.arrays["present.sum"][:] = total


def _results(graph: ByLength | _Graph, batch: int, tokens: int, runs: int) -> list[Arrays]:
    generator = np.random.default_rng(tokens)
    inputs = {
        "input_ids": generator.integers(0, 9, (batch, tokens)),
        "past.sum": generator.integers(0, 9, (batch, 2)),
        "past.kept": generator.integers(0, 9, (batch, 1)),
    }
    outputs = {
        "logits": np.zeros((batch, tokens, 3), np.int64),
        "present.sum": np.zeros((batch, 2), np.int64),
    }
    call, found = graph.bind(inputs, outputs), []
    for _ in range(runs):
        call.run()
        found.append({name: array.copy() for name, array in outputs.items()})
        inputs["input_ids"] += 1  # a bound call reads its buffers anew
        inputs["past.sum"][:] = outputs["present.sum"]
    return found


@given(
    lengths=st.sets(st.integers(2, 9)).map(lambda more: more | {1}),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    free=st.booleans(),
)
def test_any_number_of_tokens_is_what_one_graph_gives(
    lengths: set[int], batch: int, tokens: int, free: bool
) -> None:
    graph = ByLength(_SPEC, {length: _Graph(length) for length in lengths}, _Graph(0) if free else None)
    expected = _results(_Graph(0), batch, tokens, runs=2)
    for found, wanted in zip(_results(graph, batch, tokens, runs=2), expected, strict=True):
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


@given(st.sets(st.integers(2, 64)).map(lambda more: more | {1}), st.integers(0, 600))
def test_a_cut_has_every_token_once_and_long_pieces_first(lengths: set[int], tokens: int) -> None:
    pieces = list(cut(tokens, dict.fromkeys(lengths)))
    assert sum(pieces) == tokens
    assert set(pieces) <= lengths
    assert pieces == sorted(pieces, reverse=True)


def test_the_file_for_a_number_of_tokens_is_taken() -> None:
    lengths = (LengthSpec(1, "onnx", "one.onnx"), LengthSpec(8, "torchscript", "eight.pt"))
    spec = GraphSpec(_SPEC.file, _SPEC.inputs, _SPEC.outputs, {"torchscript": "any.pt"}, lengths)
    loaded: dict[str, GraphSpec] = {}

    def load(file: str, form: GraphSpec) -> _Graph:
        loaded[file] = form
        return _Graph(0)

    open_lengths(spec, load)
    assert list(loaded) == ["one.onnx", "model.onnx"]
    assert loaded["one.onnx"].inputs[0].shape == ("batch", 1)
    assert loaded["model.onnx"].outputs[0].shape == ("batch", "tokens", 3)
    loaded.clear()
    open_lengths(spec, load, "torchscript")
    assert list(loaded) == ["eight.pt", "any.pt"]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([{"tokens": 1, "format": "onnx", "file": "nowhere.onnx"}], "not among the files"),
        ([{"tokens": 0, "format": "onnx", "file": "model.onnx"}], "tokens is 0; at least 1"),
        ([{"tokens": 513, "format": "onnx", "file": "model.onnx"}], "at most 512"),
        ([{"tokens": 8, "format": "onnx", "file": "model.onnx"}], "no graph of 1 token"),
        ([{"tokens": 1, "format": "onnx", "file": "model.onnx"}] * 2, "stand twice"),
        ([{"tokens": 1, "format": "torchscript", "file": "model.onnx"}], "no file of its own"),
        ([{"tokens": 1, "format": "tensorrt", "file": "model.onnx"}], "known: onnx"),
        ([{"tokens": 1, "format": "onnx", "file": "model.onnx", "more": 1}], "unknown field 'more'"),
    ],
)
def test_a_manifest_with_lengths_that_do_not_fit_is_refused(
    bundle_copy: Path, lengths: list[dict[str, object]], message: str
) -> None:
    path = bundle_copy / "titans.json"
    content = json.loads(path.read_text())
    content["graphs"]["model"]["lengths"] = lengths
    path.write_text(json.dumps(content))
    with pytest.raises(tr.BundleError, match=message):
        tr.load(bundle_copy)
