"""Checkpoints: what is saved is what is loaded. Damaged ones are in ``test_pipeline.py``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from titans_export.config import PRESETS, overridden
from titans_export.model import TitansModel
from titans_export.training.checkpoint import (
    PROGRESS_FILE,
    SUMMARY_FILE,
    load_checkpoint,
    read_tensors,
    round_to_half,
    save_checkpoint,
)
from titans_runtime import cli
from titans_runtime.errors import DataError


def test_halves_are_rounded_once_and_memories_never() -> None:
    config = overridden(PRESETS["tiny"], ["learned_memory=true", "memory_depth=1", "architecture=mac"])
    model = TitansModel(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_to_half(model)
    for name, tensor in model.state_dict().items():
        rounded = tensor.dim() == 2 and not name.startswith("readout_key.")
        assert torch.equal(tensor, before[name].half().float() if rounded else before[name]), name
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_weight_too_large_for_a_half_is_refused() -> None:
    model = TitansModel(PRESETS["tiny"])
    with torch.no_grad():
        model.head.weight[0, 0] = 7e4
    with pytest.raises(DataError, match=r"head\.weight: a weight is larger than float16 holds"):
        round_to_half(model)


def test_round_trip_is_exact(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_checkpoint(tiny_checkpoint)
    save_checkpoint(model, tmp_path / "deep" / "copy")
    copy = load_checkpoint(tmp_path / "deep" / "copy")
    assert copy.config == model.config
    assert not copy.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name
    assert sorted(path.name for path in (tmp_path / "deep" / "copy").iterdir()) == [
        "config.json",
        "weights.safetensors",
    ]
    for name in ("config.json", "weights.safetensors"):  # saving is deterministic
        assert (tmp_path / "deep" / "copy" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_a_checkpoint_holds_the_whitening(tiny_checkpoint: Path) -> None:
    tensors = read_tensors(tiny_checkpoint / "weights.safetensors")
    assert {"readout_key.mean", "readout_key.whitening"} <= tensors.keys()


def test_loaded_weights_are_the_models_own(tiny_checkpoint: Path) -> None:
    first, second = load_checkpoint(tiny_checkpoint), load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        first.head.weight.zero_()
    assert not torch.equal(first.head.weight, second.head.weight)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.safetensors: no readable tensors"):
        read_tensors(tmp_path / "nowhere.safetensors")


def test_init_depends_on_its_seed_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def init(name: str, seed: int) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        torch.manual_seed(len(name))  # what ran before must not matter
        assert cli.main(["init", "--preset", "tiny", "--seed", str(seed), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        return read_tensors(out / "weights.safetensors")

    first, again, other = init("first", 3), init("once more", 3), init("other", 4)
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert load_checkpoint(tmp_path / "first").config == PRESETS["tiny"]


# --- a folder that holds one already


@pytest.fixture
def trained(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / SUMMARY_FILE).write_text("{}", encoding="utf-8")
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("left", ["config.json", "weights.safetensors", PROGRESS_FILE])
def test_init_refuses_a_folder_that_holds_a_checkpoint(
    trained: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    """The whole of one, a part, or an unfinished training."""
    (trained / PROGRESS_FILE).write_bytes(b"of a training")
    for path in trained.iterdir():
        if path.name not in (left, SUMMARY_FILE):
            path.unlink()
    before = _content(trained)
    assert cli.main(["init", "--preset", "tiny", "--out", str(trained)]) == 2
    assert capsys.readouterr().err == (
        f"titans: --out {trained}: holds a checkpoint already ({left}); name another folder, "
        "or replace it with --force\n"
    )
    assert _content(trained) == before


def test_a_checkpoint_that_is_replaced_leaves_nothing_behind(trained: Path) -> None:
    (trained / PROGRESS_FILE).write_bytes(b"of a training")
    before = _content(trained)
    assert cli.main(["init", "--preset", "tiny", "--out", str(trained), "--force"]) == 0
    after = _content(trained)
    assert after.keys() == {"config.json", "weights.safetensors"}
    assert after["weights.safetensors"] != before["weights.safetensors"]
