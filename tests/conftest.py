"""Fixtures that several folders share: small checkpoints and the bundles exported from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine must not turn a law into a timing assertion.
settings.register_profile("titans", deadline=None, print_blob=True)
settings.load_profile("titans")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", action="append", default=[], metavar="NAME", help="run an optional suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``suite("name")`` run when that suite is asked for, and then no others do."""
    wanted = set(config.getoption("--suite"))
    chosen = [item for item in items if wanted & _suites(item) or not (wanted or _suites(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _suites(item: pytest.Item) -> set[str]:
    return {name for mark in item.iter_markers("suite") for name in mark.args}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` model with random weights, lively gates, and editing recommended."""
    import torch

    from titans_export.config import PRESETS
    from titans_export.model import TitansModel
    from titans_export.training.checkpoint import save_checkpoint

    torch.manual_seed(0)
    model = TitansModel(PRESETS["tiny"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.readout_key.mean.normal_(std=0.1)
        model.readout_key.whitening.add_(0.1 * torch.randn_like(model.readout_key.whitening))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_checkpoint(model, folder)
    editing = {"edit": 0.5, "editor": {"objective": "readout", "step": 0.5, "chunk": 4}}
    (folder / "editing.json").write_text(json.dumps(editing), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint`, verified when it was exported. Tests copy it before they harm it."""
    from titans_export.pipeline import export_bundle

    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    export_bundle(tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def twin_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint` with every graph as TorchScript, too."""
    from titans_export.pipeline import export_bundle

    folder = tmp_path_factory.mktemp("twin") / "bundle"
    export_bundle(tiny_checkpoint, folder, formats=["torchscript"])
    return folder


@pytest.fixture(scope="session")
def compiled_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint` with every graph in all of PyTorch's formats; minutes of compiling."""
    from titans_export.pipeline import export_bundle

    folder = tmp_path_factory.mktemp("compiled") / "bundle"
    export_bundle(tiny_checkpoint, folder, formats=["torchscript", "aoti"])
    return folder
