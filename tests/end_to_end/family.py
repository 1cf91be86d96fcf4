"""Every architecture and memory, exported and run: what the tests of both weight types share."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import titans_runtime as tr
from titans_export.config import PRESETS, ModelConfig
from titans_export.model import TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import load_checkpoint, round_to_half, save_checkpoint
from titans_runtime.backends import DTYPES, Array

ARCHITECTURES = ("lmm", "mal", "mag", "mac")
MEMORIES = {
    "matrix": {},
    "matrix, period 4, no momentum": {"period": 4, "momentum": False},
    "MLP of depth 2, period 4": {"memory_depth": 2, "period": 4, "learned_memory": True},
}
MEMBERS = [f"{architecture}: {memory}" for architecture in ARCHITECTURES for memory in MEMORIES]
TEXT = b"def f(x):\n    return [y * y for y in x if y % 2]  # 67 tokens: windows, segments\n"


@dataclass(frozen=True)
class Member:
    """One exported model beside its PyTorch original."""

    torch: TitansModel
    bundle: Path
    model: tr.Model


def config_of(member: str) -> ModelConfig:
    architecture, memory = member.split(": ")
    return replace(PRESETS["tiny"], architecture=architecture, **MEMORIES[memory])


def export_member(
    member: str, weights: str, folder: Path, scan: str = "plugin", tokens: tuple[int, ...] = (64,)
) -> Member:
    """Random weights, exported and verified.

    Livelier ones make an untrained deep memory with λ = 1 chaotic: rounding errors double every few tokens,
    in float64 just as in float32.
    """
    torch.manual_seed(1)
    model = TitansModel(config_of(member))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_checkpoint(model, folder / "checkpoint")
    result = export_bundle(
        folder / "checkpoint", folder / "bundle", weights=weights, scan=scan, tokens=tokens
    )
    assert result.passed
    original = load_checkpoint(folder / "checkpoint")
    if weights == "float16":
        round_to_half(original)
    return Member(original, folder / "bundle", tr.load(folder / "bundle", threads=1))


def check_member(member: Member, weights: str, folder: Path) -> None:
    """All that must hold of every one of them."""
    _check_manifest(member, weights)
    _check_equals_torch(member)
    _check_cuts(member)
    _check_state_is_restored(member, folder)
    _check_rows_at_different_positions(member)


def _check_manifest(member: Member, weights: str) -> None:
    manifest = member.model.manifest
    assert manifest.model["weights"] == weights
    for entry in manifest.state:
        if entry.role in ("memory", "momentum", "anchor"):
            assert entry.dtype == "float32", "the memory is never rounded"
    matrices = sum(p.numel() for p in member.torch.parameters() if p.dim() == 2)
    size = manifest.files["weights.bin"].size
    pages = 4096 * 60  # every tensor begins at a page
    assert (size <= 2 * matrices + pages) if weights == "float16" else (size >= 4 * matrices)


@torch.no_grad()
def _check_equals_torch(member: Member) -> None:
    """The float64 model is the oracle: two float32 results may stand on either side of it."""
    oracle = copy.deepcopy(member.torch).double()
    for edit in ([0.0, 0.0], [1.0, 1.0], [0.25, 0.75]):
        strength = torch.tensor([edit], dtype=torch.float64)
        expected = oracle(torch.tensor([list(TEXT)]), strength, oracle.initial_state(1)).logits[0]
        assert_close(member.model.session(edit=edit, editor=None).append(TEXT), expected.numpy())


def _check_cuts(member: Member) -> None:
    """The same stream in one call and in many, across windows, periods and segments."""
    whole = member.model.session(edit=[0.5, 1.0], editor=None)
    expected = whole.append(TEXT)
    sizes = {name: array.shape for name, array in whole.snapshot().arrays.items()}
    for seed in range(3):
        draw = np.random.default_rng(seed)
        places = sorted(draw.choice(np.arange(1, len(TEXT)), size=9, replace=False).tolist())
        session = member.model.session(edit=[0.5, 1.0], editor=None)
        parts = [
            session.append(TEXT[start:end]) for start, end in itertools.pairwise([0, *places, len(TEXT)])
        ]
        assert_close(np.concatenate(parts), expected)
        for name, array in session.snapshot().arrays.items():
            assert_close(array, whole.snapshot().arrays[name])
            assert array.shape == sizes[name]


def _check_state_is_restored(member: Member, folder: Path) -> None:
    session = member.model.session(edit=0.5, editor=None)
    session.append(TEXT[:37])
    mark = session.snapshot()
    session.save(folder / "memory")
    first = list(session.generate(12, seed=1))
    session.restore(mark)
    again = list(session.generate(12, seed=1))
    loaded = tr.load(member.bundle, threads=1).load_session(folder / "memory")
    assert first == again == list(loaded.generate(12, seed=1))
    for name, array in session.snapshot().arrays.items():
        assert np.array_equal(array, loaded.snapshot().arrays[name]), name


def _check_rows_at_different_positions(member: Member) -> None:
    """A batch with an edit strength for each row and layer, whose rows are anywhere in their streams."""
    starts, edits, tokens = (3, 10, 21), ([0.0, 1.0], [1.0, 0.5], [0.25, 0.0]), 15
    sessions = [member.model.session(edit=edit, editor=None) for edit in edits]
    for session, start in zip(sessions, starts, strict=True):
        session.append(TEXT[:start])
    snapshots = [session.snapshot().arrays for session in sessions]
    inputs: dict[str, npt.NDArray[np.generic]] = {
        f"past.{entry.name}": np.concatenate([arrays[f"state.{entry.name}"] for arrays in snapshots])
        for entry in member.model.manifest.state
    }
    inputs["input_ids"] = np.array([list(TEXT[start : start + tokens]) for start in starts])
    inputs["edit"] = np.array(edits, np.float32)
    axes = {"batch": len(starts), "tokens": tokens}
    outputs = {
        tensor.name: np.zeros([axes.get(str(axis), axis) for axis in tensor.shape], DTYPES[tensor.dtype])
        for tensor in member.model.manifest.graphs["model"].outputs
    }
    member.model.graph.bind(inputs, outputs).run()
    for row, (session, start) in enumerate(zip(sessions, starts, strict=True)):
        assert_close(outputs["logits"][row], session.append(TEXT[start : start + tokens]))
        for name, array in session.snapshot().arrays.items():
            present = outputs.get(name.replace("state.", "present.", 1))
            if present is not None:
                assert_close(present[row : row + 1], array)


def assert_close(actual: Array, expected: Array) -> None:
    scale = max(float(np.abs(expected).max()), 1e-6)
    assert float(np.abs(actual.astype(np.float64) - expected).max()) <= 1e-4 * scale
