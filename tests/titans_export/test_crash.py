"""Bundles and checkpoints are the old ones or the new ones, at whatever step a process is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.crashes import killed_at_every_step
from titans_converters.gradients import gradient_graphs
from titans_converters.onnx.trace import trace
from titans_export import pipeline
from titans_export.config import PRESETS, overridden
from titans_export.exportable import Exportable, load_exportable
from titans_export.model import TitansModel
from titans_export.training import loop
from titans_export.training.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from titans_export.training.data import Corpus, Source
from titans_export.training.loop import PROGRESS_FILE, Trainer, TrainingConfig, train
from titans_runtime import bundle as bundles
from titans_runtime.errors import DataError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CONFIG = PRESETS["tiny"]


def _content(folder: Path) -> dict[str, bytes]:
    """Every file of a bundle, as the runtime reads it: under its size and hash."""
    bundle = bundles.open_bundle(folder)
    return {name: bundle.read(name) for name in bundle.manifest.files}


@pytest.mark.suite("crash")
@pytest.mark.parametrize(
    ("replaces", "weights", "every"),
    [(True, "float32", 1), (False, "float32", 1), (True, "int8", 7)],
    ids=["an older bundle", "nothing", "an older bundle by integers"],
)
def test_an_export_killed_at_every_step(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replaces: bool,
    weights: str,
    every: int,
) -> None:
    """All that reaches the disk: what is computed before that is computed once, here."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "here" / "bundle"
    shutil.copytree(tiny_checkpoint, checkpoint)
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    save_checkpoint(model, checkpoint)
    exportable = load_exportable(checkpoint)
    pipeline._round(exportable, weights)
    goldens, graphs = exportable.goldens(), _traced(exportable, quantised=weights == "int8")
    gradients = gradient_graphs(graphs["model"], pipeline.editable_memories(exportable))
    monkeypatch.setattr(type(exportable), "goldens", lambda self, watch: goldens)
    monkeypatch.setattr(pipeline, "trace", lambda program, _: graphs[program.name])
    monkeypatch.setattr(pipeline, "gradient_graphs", lambda *_: gradients)
    pipeline.export_bundle(checkpoint, tmp_path / "new", weights=weights)
    old, new = _content(tiny_bundle) if replaces else None, _content(tmp_path / "new")
    assert old != new

    def prepare() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if replaces:
            shutil.copytree(tiny_bundle, out)

    found = [
        _content(out) if out.exists() else None
        for _ in killed_at_every_step(
            lambda: pipeline.export_bundle(checkpoint, out, weights=weights), out.parent, prepare, every
        )
    ]
    assert [content for content in found if content not in (old, new)] == []
    assert old in found
    assert new in found
    assert len(found) > 100 // every


def _traced(exportable: Exportable, quantised: bool) -> dict[str, ir.Model]:
    programs = exportable.programs(quantised=quantised)
    return {program.name: trace(program, exportable.recurrences()) for program in programs}


# --- training


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    def source(name: str, seed: int) -> Source:
        return Source(name, np.random.default_rng(seed).bytes(2000))

    return Corpus([source("a", 0), source("b", 1)], [source("c", 2)], [source("d", 3)])


@pytest.fixture
def trainer(corpus: Corpus) -> Trainer:
    torch.set_num_threads(1)  # a process that is forked has no others
    config = TrainingConfig(steps=4, batch=2, segment=32, mixed_precision=False)
    trainer = Trainer(CONFIG, config, corpus)
    trainer.advance(0)
    return trainer


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.suite("crash"))])
def test_a_saved_training_killed_at_every_step(trainer: Trainer, tmp_path: Path, every: int) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    trainer.save(tmp_path / "old")
    trainer.advance(1)
    found = []
    for _ in killed_at_every_step(
        lambda: trainer.save(folder / PROGRESS_FILE),
        folder,
        prepare=lambda: shutil.copy(tmp_path / "old", folder / PROGRESS_FILE),
        every=every,
    ):
        other = Trainer(CONFIG, trainer.config, trainer.corpus)
        other.resume(folder / PROGRESS_FILE)
        found.append(other.step)
        if other.step == 2:
            for name, tensor in trainer.model.state_dict().items():
                assert torch.equal(other.model.state_dict()[name], tensor), name
    assert set(found) == {1, 2}


@pytest.mark.suite("crash")
def test_the_end_of_a_training_killed_at_every_step(
    trainer: Trainer, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whatever it leaves, the training ends as an unbroken one."""
    monkeypatch.setattr(loop, "_summary", lambda *arguments: {"command": "titans train"})
    for step in range(1, 4):
        trainer.advance(step)
    trainer.save(tmp_path / "saved")
    folder = tmp_path / "here"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(tmp_path / "saved", folder / PROGRESS_FILE)

    def finish() -> None:
        train(CONFIG, trainer.config, corpus, folder, "titans train")

    prepare()
    finish()
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(expected) == {"config.json", "weights.safetensors", "training.json"}
    kills = 0
    for _ in killed_at_every_step(finish, folder, prepare=prepare):
        kills += 1
        finish()
        left = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
        assert left == expected
    assert kills > 50


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.suite("crash"))])
def test_a_checkpoint_killed_while_another_replaces_it_is_never_a_mixture(tmp_path: Path, every: int) -> None:
    """Both have the same shapes, so that nothing but the name of its config tells whose the weights are."""
    torch.manual_seed(0)
    old, new = (TitansModel(overridden(CONFIG, [f"tile={tile}"])) for tile in (16, 8))
    save_checkpoint(old, tmp_path / "old")
    folder = tmp_path / "here"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)

    found = []
    for _ in killed_at_every_step(lambda: save_checkpoint(new, folder), folder, prepare=prepare, every=every):
        with contextlib.suppress(DataError):
            model = load_checkpoint(folder)
            found.append(model.config.tile)
            right = old if model.config == old.config else new
            assert torch.equal(model.head.weight, right.head.weight)
            assert not torch.equal(old.head.weight, new.head.weight)
    assert set(found) == {16, 8}


def test_weights_beside_another_config_are_refused(tmp_path: Path) -> None:
    model = TitansModel(CONFIG)
    save_checkpoint(model, tmp_path)
    weights = (tmp_path / "weights.safetensors").read_bytes()
    save_checkpoint(TitansModel(dataclasses.replace(CONFIG, tile=CONFIG.tile * 2)), tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(weights)
    assert read_tensors(tmp_path / "weights.safetensors").keys() == model.state_dict().keys()
    with pytest.raises(DataError, match=r"was saved with another config\.json than the one beside it; "):
        load_checkpoint(tmp_path)
