"""A bundle unrolled for given numbers of tokens does what every bundle does, and computes the same."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_runtime as tr
from tests.end_to_end.family import MEMBERS, check_member, export_member
from titans_export.pipeline import export_bundle
from titans_runtime.backends import Array
from titans_runtime.cli import main

TEXT = b"for x in range(9):\n    print(x * x, end=' ')\n"
EDITORS = (
    None,
    "readout:step=0.5,chunk=4",
    "prediction:step=0.1,chunk=7,optimizer=sgd",
    "association:step=0.1,chunk=5,optimizer=titans",
)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unrolled") / "bundle"
    assert (
        main(["export", str(tiny_checkpoint), "--out", str(folder), "--scan", "unrolled", "--tokens", "6,16"])
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def models(bundle: Path, tiny_bundle: Path) -> tuple[tr.Model, tr.Model]:
    return tr.load(bundle, threads=1), tr.load(tiny_bundle, threads=1)


def test_the_bundle_holds_flat_graphs_over_one_weights_file(bundle: Path, tiny_bundle: Path) -> None:
    manifest = tr.load(bundle, threads=1).manifest
    assert manifest.graphs["model"].files_by_length() == {
        1: "model.1.onnx",
        6: "model.6.onnx",
        16: "model.onnx",
    }
    assert manifest.model["scan"] == "unrolled"
    for file in manifest.graphs["model"].files_by_length().values():
        graph = onnx.load(bundle / file, load_external_data=False)
        assert not graph.functions
        assert {node.domain for node in graph.graph.node} == {""}
        assert not any(
            item.type == onnx.AttributeProto.GRAPH for n in graph.graph.node for item in n.attribute
        )
    size, whole = ((folder / "weights.bin").stat().st_size for folder in (bundle, tiny_bundle))
    assert size <= whole + 20 * 4096  # folded masks, a page each


@settings(max_examples=25)
@given(
    cuts=st.sets(st.integers(1, len(TEXT) - 1), max_size=6),
    edit=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=2),
    editor=st.sampled_from(EDITORS),
)
def test_any_cut_with_any_editing_is_what_the_plugin_form_gives(
    models: tuple[tr.Model, tr.Model], cuts: set[int], edit: list[float], editor: str | None
) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    found: list[tuple[Array, dict[str, Array]]] = []
    for model in models:
        session = model.session(edit=edit, editor=tr.Editor.parse(editor) if editor else None)
        logits = [session.append(TEXT[a:b]) for a, b in itertools.pairwise(places)]
        found.append((np.concatenate(logits), session.snapshot().arrays))
    (logits, state), (expected, wanted) = found
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    assert state.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(
            state[name], array, atol=1e-5 * max(np.abs(array).max(), 1.0), err_msg=name
        )


def test_a_batch_gives_what_single_sessions_give(models: tuple[tr.Model, tr.Model]) -> None:
    model = models[0]
    strengths, starts = (0.0, 0.4, 1.0), (3, 10, 21)
    rows, alone = ([model.session(edit=edit, editor=None) for edit in strengths] for _ in range(2))
    for sessions in (rows, alone):
        for session, start in zip(sessions, starts, strict=True):
            session.append(TEXT[:start])
    parts = [TEXT[start : start + 23] for start in starts]
    with model.batch(rows) as batch:
        together = batch.append(parts)
    for found, session, part in zip(together, alone, parts, strict=True):
        expected = session.append(part)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_state_is_saved_restored_and_generated_from(
    models: tuple[tr.Model, tr.Model], tmp_path: Path
) -> None:
    model = models[0]
    session = model.session()
    session.append(TEXT[:31])
    session.save(tmp_path / "memory")
    first = list(session.generate(20, seed=3))
    loaded = model.load_session(tmp_path / "memory")
    assert list(loaded.generate(20, seed=3)) == first
    for name, array in session.snapshot().arrays.items():
        np.testing.assert_array_equal(array, loaded.snapshot().arrays[name])


def test_a_call_that_fails_leaves_the_session_as_it_was(models: tuple[tr.Model, tr.Model]) -> None:
    """Several pieces run before the values are looked at; all of them are taken back."""
    session = models[0].session(edit=1.0, editor=None)
    session.append(TEXT[:5])
    mark = session.snapshot()
    arrays = dict(mark.arrays)
    arrays["state.layers.0.conv"] = np.full_like(arrays["state.layers.0.conv"], np.nan)
    session.restore(dataclasses.replace(mark, arrays=arrays))
    with pytest.raises(tr.NumericsError):
        session.append(TEXT)
    for name, array in session.snapshot().arrays.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_verify_and_inspect_take_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle)]) == 0
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert '"unrolled"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scan", "unrolled", "--quantize", "int8"], "--weights float16"),
        (["--scan", "unrolled", "--tokens", "0"], "--tokens 0: must be 1 to 512"),
        (["--scan", "unrolled", "--tokens", "513"], "--tokens 513"),
        (["--scan", "unrolled", "--tokens", "many"], "whole numbers"),
        (["--tokens", "8"], "--scan unrolled"),
        (["--scan", "unrolled", "--format", "onnx,tensorrt"], "any number of tokens"),
        (["--scan", "unrolled", "--triton-repository", "models"], "any number of tokens"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(["export", str(tiny_checkpoint), "--out", str(tmp_path / "bundle"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_what_needs_one_graph_refuses_the_bundle(bundle: Path, tmp_path: Path) -> None:
    from titans_converters.inference_server import write_repository
    from titans_converters.tensorrt.builder import load_model
    from titans_runtime.bundle import open_bundle

    for action in (
        lambda: write_repository(open_bundle(bundle), tmp_path),
        lambda: load_model(open_bundle(bundle)),
    ):
        with pytest.raises(tr.UsageError, match="given numbers of tokens"):
            action()


@pytest.mark.suite("family")
@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_of_the_family(member: str, tmp_path: Path) -> None:
    check_member(
        export_member(member, "float32", tmp_path, scan="unrolled", tokens=(9,)), "float32", tmp_path
    )


@pytest.mark.suite("titans-pytorch")
def test_an_imported_transformer(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from tests.titans_export.importers.cases import TRANSFORMER_BASE
    from titans_export.importers.titans_pytorch.checkpoint import LIBRARY, save_imported
    from titans_export.importers.titans_pytorch.options import TransformerOptions, to_dict
    from titans_export.importers.titans_pytorch.transformer import TransformerModel

    model = TransformerModel(TransformerOptions.read(dict(TRANSFORMER_BASE))).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = {"library": LIBRARY, "class": "MemoryAsContextTransformer", "tokenizer": "ids"}
    save_imported(model, config | {"options": to_dict(model.options)}, tmp_path / "checkpoint")
    assert export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", scan="unrolled", tokens=(7,)).passed


@pytest.mark.suite("peers")
def test_openvino_takes_it_and_computes_the_same(bundle: Path, tiny_bundle: Path) -> None:
    """What is not installed is a failure here."""
    beside = f"openvino:{bundle}"
    assert main(["bench", str(tiny_bundle), "--beside", beside, "-p", "37", "-n", "3", "-b", "1,3"]) == 0
