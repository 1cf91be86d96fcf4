"""Training: the data and its split, a loss that falls, and a killed run that ends as an unbroken one."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from titans_export.config import PRESETS, overridden
from titans_export.model import TitansModel, initial_state
from titans_export.training.checkpoint import load_checkpoint, read_tensors
from titans_export.training.data import SegmentStream, Source, load_corpus, split_of
from titans_export.training.evaluate import bits_per_byte
from titans_export.training.loop import PROGRESS_FILE, SUMMARY_FILE, Trainer, TrainingConfig, train
from titans_export.training.whitening import measure_whitening
from titans_runtime import cli
from titans_runtime.errors import DataError

CONFIG = PRESETS["tiny"]
_WORDS = ("memory", "learns", "at", "test", "time", "and", "forgets", "what", "it", "must")


def _text(seed: int, length: int) -> bytes:
    words = np.random.default_rng(seed).choice(_WORDS, length // 3)
    return " ".join(words).encode()[:length]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small files in two folders, and one that a corpus must not see."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "inner").mkdir()
    for index in range(60):
        place = folder / "inner" if index % 2 else folder
        (place / f"{index}.txt").write_bytes(_text(index, 300 + 7 * index))
    (folder / ".hidden").write_bytes(b"not text")
    return folder


def _source(name: str, length: int, seed: int = 0) -> Source:
    return Source(name, _text(seed, length))


# --- data


def test_split_is_a_function_of_the_name(texts: Path) -> None:
    corpus = load_corpus([str(texts)])
    splits = {"train": corpus.train, "development": corpus.development, "held_out": corpus.held_out}
    names = {split: [source.name for source in sources] for split, sources in splits.items()}
    assert all(split_of(name) == split for split, members in names.items() for name in members)
    everything = list(itertools.chain(*names.values()))
    assert sorted(everything) == sorted(p.relative_to(texts).as_posix() for p in texts.rglob("*.txt"))
    assert ".hidden" not in everything


def test_split_never_moves() -> None:
    """Published numbers rest on it: these names were split this way in the first version."""
    shares = dict.fromkeys(("train", "development", "held_out"), 0)
    for index in range(24_000):
        shares[split_of(f"{index}.py")] += 1
    assert shares["development"] == pytest.approx(1000, rel=0.1)
    assert shares["held_out"] == pytest.approx(1000, rel=0.1)
    known = {"codecs.py": "development", "contextvars.py": "held_out", "json/decoder.py": "train"}
    assert {name: split_of(name) for name in known} == known


def test_stream_depends_on_seed_and_step_only() -> None:
    sources = [_source(str(i), 100 + i, seed=i) for i in range(9)]
    walked = SegmentStream(sources, 3, 16, seed=5)
    batches = [walked.at(step) for step in range(3 * walked.steps_per_epoch)]
    for step in reversed(range(len(batches))):
        inputs, targets = SegmentStream(sources, 3, 16, seed=5).at(step)
        assert torch.equal(inputs, batches[step][0])
        assert torch.equal(targets, batches[step][1])
        assert inputs.shape == targets.shape == (3, 16)
        assert inputs.dtype == targets.dtype == torch.int64
    other = SegmentStream(sources, 3, 16, seed=6)
    assert not all(torch.equal(other.at(step)[0], batch[0]) for step, batch in enumerate(batches))


def test_stream_walks_on_within_an_epoch_and_shuffles_between() -> None:
    sources = [_source(str(i), 100 + i, seed=i) for i in range(9)]
    stream = SegmentStream(sources, 3, 16, seed=5)
    for step in range(stream.steps_per_epoch):
        inputs, targets = stream.at(step)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        if step + 1 < stream.steps_per_epoch:
            assert torch.equal(targets[:, -1], stream.at(step + 1)[0][:, 0])
    assert not torch.equal(stream.at(0)[0], stream.at(stream.steps_per_epoch)[0])


def test_stream_refuses_too_little_text() -> None:
    with pytest.raises(DataError, match="40 bytes of training text do not fill one step of 4 x 16"):
        SegmentStream([_source("a", 40)], 4, 16, seed=0)


# --- the loop


@pytest.mark.parametrize("architecture", ["lmm", "mac", "mag", "mal"])
@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_every_architecture_learns_its_first_memory(architecture: str, edit: float, texts: Path) -> None:
    """Gradients reach every weight, and a row that is reset begins with the memory as it is now."""
    deep = ["memory_depth=2", "period=4", "learned_memory=true", f"architecture={architecture}"]
    config = TrainingConfig(steps=12, batch=4, segment=32, edit=edit, mixed_precision=False)
    trainer = Trainer(overridden(CONFIG, deep), config, load_corpus([str(texts)]))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    for step in range(config.steps):
        trainer.advance(step)
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert all(torch.isfinite(tensor).all() for tensor in trainer.state.values())
    assert not any(tensor.requires_grad for tensor in trainer.state.values())


def test_training_lowers_the_loss(texts: Path, tmp_path: Path) -> None:
    corpus = load_corpus([str(texts)])
    config = TrainingConfig(
        steps=40, batch=4, segment=64, save_every=15, validate_every=20, mixed_precision=False
    )
    torch.manual_seed(config.seed)
    before = bits_per_byte(TitansModel(CONFIG), corpus.held_out, edit=0.0)
    lines: list[str] = []
    trained = train(CONFIG, config, corpus, tmp_path, "titans train", report=lines.append)
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text())
    assert before == pytest.approx(8, abs=0.1)  # a new model knows nothing
    assert summary["bits_per_byte"]["held_out"] < before - 2
    assert [line.split(":")[0] for line in lines] == ["step 20", "step 40"]
    assert summary["held_out_files"] == [source.name for source in corpus.held_out]
    assert summary["command"] == "titans train"
    assert not (tmp_path / PROGRESS_FILE).exists()
    loaded = load_checkpoint(tmp_path)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in trained.state_dict().items())
    assert not torch.equal(trained.readout_key.whitening, torch.eye(CONFIG.d_model))


_OPTIONS = ["--preset", "tiny", "--steps", "60", "--batch", "2", "--segment", "32", "--threads", "1"]
_OPTIONS += ["--float32", "--save-every", "2", "--validate-every", "1000", "--edit", "1"]


def _command(texts: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "titans_runtime",
        "train",
        "--data",
        str(texts),
        "--out",
        str(out),
        *_OPTIONS,
    ]


def _train_until_killed(texts: Path, out: Path) -> bool:
    """Kill a training at its first saved state; false where it was done before the kill reached it."""
    process = subprocess.Popen(
        _command(texts, out),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and not (out / PROGRESS_FILE).exists():
            time.sleep(0.002)  # of waiting for another process: nothing here depends on its length
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return (out / PROGRESS_FILE).exists()


@pytest.fixture(scope="module")
def killed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training left that was killed on its way. Tests copy it."""
    attempts = (tmp_path_factory.mktemp("killed") / "checkpoint" for _ in range(5))
    out = next((out for out in attempts if _train_until_killed(texts, out)), None)
    assert out is not None, "no training was killed while it had a state to resume from"
    assert not (out / "weights.safetensors").exists()
    return out


def test_resuming_with_other_settings_is_refused(
    texts: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checkpoint"
    shutil.copytree(killed, out)
    saved = (out / PROGRESS_FILE).read_bytes()
    arguments = ["train", "--data", str(texts), "--out", str(out), *_OPTIONS]
    for options, setting in (
        (["--seed", "1"], "training"),
        (["--preset", "nano"], "model"),
        (["--data", str(texts), str(texts / "0.txt")], "corpus"),
    ):
        assert cli.main([*arguments, *options]) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"titans: {out / PROGRESS_FILE}: belongs to a training with another {setting} setting; "
            "remove it or change --out"
        )
        assert (out / PROGRESS_FILE).read_bytes() == saved


def test_a_killed_training_ends_as_an_unbroken_one(texts: Path, killed: Path, tmp_path: Path) -> None:
    """Bit for bit, and it does go on from where it was, instead of from the start."""
    resumed, unbroken = tmp_path / "resumed", tmp_path / "unbroken"
    shutil.copytree(killed, resumed)
    with safe_open(killed / PROGRESS_FILE, framework="pt") as file:
        saved = json.loads(file.metadata()["training"])
    assert 0 < saved["step"] < saved["training"]["steps"]
    for out in (resumed, unbroken):
        done = subprocess.run(
            _command(texts, out),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}\n"
        assert not (out / PROGRESS_FILE).exists()
    expected = read_tensors(unbroken / "weights.safetensors")
    actual = read_tensors(resumed / "weights.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    middle = read_tensors(killed / PROGRESS_FILE)["model.head.weight"]
    assert not torch.equal(middle, expected["head.weight"])


def test_a_saved_state_is_what_training_goes_on_from(texts: Path, killed: Path, tmp_path: Path) -> None:
    """A changed weight in it changes the result: resuming is not a new beginning."""
    with safe_open(killed / PROGRESS_FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = read_tensors(killed / PROGRESS_FILE)
    results = []
    for out, shift in ((tmp_path / "as it was", 0.0), (tmp_path / "shifted", 0.5)):
        out.mkdir()
        tensors["model.norm.weight"] += shift
        save_file(tensors, out / PROGRESS_FILE, metadata)
        assert cli.main(["train", "--data", str(texts), "--out", str(out), *_OPTIONS]) == 0
        results.append(read_tensors(out / "weights.safetensors")["norm.weight"])
    assert float((results[1] - results[0]).mean()) == pytest.approx(0.5, abs=0.2)


def test_a_damaged_saved_state_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--data", str(texts), "--out", str(tmp_path), *_OPTIONS]
    (tmp_path / PROGRESS_FILE).write_bytes(b"\0" * 40)
    assert cli.main(arguments) == 3
    save_file({"x": torch.zeros(1)}, tmp_path / PROGRESS_FILE)
    assert cli.main(arguments) == 3
    damaged, foreign = capsys.readouterr().err.splitlines()
    assert f"{PROGRESS_FILE}: no readable tensors" in damaged
    assert f"{PROGRESS_FILE}: no state of a training" in foreign


def test_a_checkpoint_is_not_trained_over(
    texts: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even its editing stays when it is replaced: that was chosen for other weights."""
    out = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    arguments = ["train", "--data", str(texts), "--out", str(out), *_OPTIONS, "--steps", "1"]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"titans: --out {out}: holds a checkpoint already (config.json); ")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert cli.main([*arguments, "--force"]) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "weights.safetensors", SUMMARY_FILE}
    assert (out / "weights.safetensors").read_bytes() != before["weights.safetensors"]


# --- data that cannot be trained on


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such file or folder"),
        ({}, "no text for the train split among 0 files"),
        ({"one.txt": b"all alone"}, "no text for the"),
        ({f"{i}.txt": b"" for i in range(60)}, "no text for the train split among 60 files"),
        ({f"{i}.txt": b"x" for i in range(60)}, "no text for the train split among 60 files"),
        ({f"{i}.txt": b"xy" for i in range(60)}, "do not fill one step of 8 x 32 bytes"),
    ],
    ids=["missing", "empty folder", "one file", "empty files", "single bytes", "too little"],
)
def test_bad_data_is_one_line(
    files: dict[str, bytes] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    if files is not None:
        data.mkdir()
        for name, content in files.items():
            (data / name).write_bytes(content)
    arguments = ["train", "--data", str(data), "--out", str(tmp_path / "out"), *_OPTIONS, "--batch", "8"]
    assert cli.main(arguments) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("titans: ")
    assert message in line
    assert not (tmp_path / "out" / "config.json").exists()


# --- evaluation


@torch.no_grad()
def _plain_bits_per_byte(model: TitansModel, texts: list[bytes], edit: float) -> float:
    """Every file alone, in one call, with the probabilities written out."""
    bits, count = 0.0, 0
    for text in texts:
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
        strength = torch.full((1, model.config.layers), edit)
        logits = model(ids, strength, initial_state(model.config, 1)).logits[0].double()
        probability = torch.softmax(logits, -1)[range(len(text) - 1), ids[0, 1:]]
        bits -= float(probability.log2().sum())
        count += len(text) - 1
    return bits / count


@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_bits_per_byte_equals_a_plain_computation(tiny_checkpoint: Path, edit: float) -> None:
    """Files of unlike lengths, one of them over a segment's edge, one too short to count."""
    model = load_checkpoint(tiny_checkpoint)
    sources = [_source("short", 77, 1), _source("long", 1500, 2), Source("tiny", b"x"), Source("pair", b"ab")]
    counted = [source.data for source in sources if source.name != "tiny"]
    assert bits_per_byte(model, sources, edit) == pytest.approx(
        _plain_bits_per_byte(model, counted, edit), rel=1e-5
    )
    limited = [text[:100] for text in counted]
    assert bits_per_byte(model, sources, edit, limit=100) == pytest.approx(
        _plain_bits_per_byte(model, limited, edit), rel=1e-5
    )


@pytest.mark.parametrize("length", [1024, 1025, 1026, 2049])
def test_bits_per_byte_at_a_segment_edge(tiny_checkpoint: Path, length: int) -> None:
    model = load_checkpoint(tiny_checkpoint)
    text = _text(3, length)
    assert bits_per_byte(model, [Source("text", text)], 1.0) == pytest.approx(
        _plain_bits_per_byte(model, [text], 1.0), rel=1e-5
    )


# --- whitening


@torch.no_grad()
def test_whitening_gives_unit_covariance(tiny_checkpoint: Path) -> None:
    """On the features it was measured on: mean 0, covariance I, but for the floor under dead directions."""
    model = load_checkpoint(tiny_checkpoint)
    sources = [_source(str(i), 4000, seed=i) for i in range(4)]
    measure_whitening(model, sources, edit=1.0, seed=3)
    features = _features(model, sources, edit=1.0, seed=3)
    white = (features - model.readout_key.mean.double()) @ model.readout_key.whitening.double()
    assert float(white.mean(0).abs().max()) < 1e-3
    variance, directions = torch.linalg.eigh(torch.cov(features.T, correction=0))
    floor = 1e-3 * variance.mean()
    covariance = directions.T @ torch.cov(white.T, correction=0) @ directions
    assert torch.allclose(covariance, torch.diag(variance / (variance + floor)), atol=1e-3)
    lively = variance > 100 * floor
    assert lively.sum() > CONFIG.d_model // 4
    assert torch.allclose(covariance.diagonal()[lively], torch.ones(int(lively.sum())).double(), atol=0.02)
    assert torch.equal(model.readout_key.whitening, model.readout_key.whitening.T)


def _features(model: TitansModel, sources: list[Source], edit: float, seed: int) -> torch.Tensor:
    """The whole stream's features, read in one call instead of segment by segment."""
    total = sum(len(source.data) for source in sources)
    segment = min(1024, total // 8 - 1)
    stream = SegmentStream(sources, 8, segment, seed)
    ids = torch.cat([stream.at(step)[0] for step in range(min(32, stream.steps_per_epoch))], dim=1)
    strength = torch.full((8, model.config.layers), edit)
    return model.features(ids, strength, initial_state(model.config, 8))[0].double().flatten(0, 1)


@torch.no_grad()
def test_whitening_survives_a_dead_feature(tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint)
    model.norm.weight[5] = 0.0
    measure_whitening(model, [_source("text", 9000)], edit=0.0, seed=0)
    assert torch.isfinite(model.readout_key.whitening).all()
    assert F.cosine_similarity(
        model.readout_key.whitening[5], torch.eye(CONFIG.d_model)[5], dim=0
    ) == pytest.approx(1, abs=1e-3)
    assert math.isfinite(bits_per_byte(model, [_source("text", 500)], 1.0))
