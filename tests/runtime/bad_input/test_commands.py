"""Commands that are asked for what they cannot do: nothing is written, and no file is harmed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import titans_runtime as tr
from tests.runtime.bad_input.support import Titans, content_of
from tests.runtime.command import TEXT
from titans_runtime.cli import main

EDITORS = {
    "prediction:step=abc": "--editor prediction:step=abc: step is 'abc'; it must be a number",
    "readout:chunk=2.5": "--editor readout:chunk=2.5: chunk is '2.5'; it must be an integer",
    "prediction:replace=1": "--editor prediction:replace=1: replace is '1'; it must be true or false",
    "readout:step": "--editor readout:step: 'step' is not NAME=VALUE (step, chunk, optimizer, ",
    "readout:pace=1": "--editor readout:pace=1: 'pace' is unknown; known: step, chunk, optimizer, ",
    "readout:step=1,step=2": "--editor readout:step=1,step=2: step is given twice",
    "readout:step=-1": "editor step is -1.0; it must be a number from 0 to 1e+06",
    "readout:step=nan": "editor step is nan; it must be a number from 0 to 1e+06",
    "readout:chunk=4096": "editor chunk is 4096; it must be an integer from 1 to 1024",
    "readout:optimizer=adam": "editor optimizer 'adam': the objective readout has sgd and adagrad",
    "prediction:optimizer=adam,momentum=1": "editor momentum is 1.0; of adam it must be a number from 0 to ",
    "prediction:optimizer=lion": "editor optimizer 'lion'; known: sgd, adagrad, titans, adam, muon",
    "prediction:memories=layers.9.*": "editor memories: 'layers.9.*' fits none of layers.0.memory, ",
    "guess": "the bundle cannot be edited by 'guess'; known: readout, prediction, association",
    "readout+readout": "editor also: one of the two edits readout, the other the layers' memories",
    "readout+prediction+association": "--editor readout+prediction+association: two editors at most",
}


@pytest.mark.parametrize("spec", EDITORS)
def test_an_editor_that_cannot_be_meant(
    model: tr.Model, tiny_bundle: Path, text: Path, titans: Titans, spec: str
) -> None:
    with pytest.raises(tr.UsageError) as caught:
        model.session(editor=tr.Editor.parse(spec))
    assert str(caught.value).startswith(EDITORS[spec])
    for command in (
        ("run", tiny_bundle, text),
        ("generate", tiny_bundle, "--prompt", "a"),
        ("bench", tiny_bundle, "-p", "2", "-n", "0"),
    ):
        assert titans(*command, "--editor", spec) == (2, f"titans: {caught.value}\n")


@pytest.fixture
def files(tiny_bundle: Path, text: Path, tmp_path: Path) -> dict[str, Path]:
    """Files that exist and must be there afterwards, and what does not exist."""
    memory = tmp_path / "memory"
    session = tr.load(tiny_bundle, threads=1).session()
    session.append(TEXT)
    session.save(memory)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(text)
    os.mkfifo(tmp_path / "pipe")
    names = ("memory", "folder", "link", "pipe", "nowhere", "new", "page")
    return {name: tmp_path / name for name in names} | {
        "text": text,
        "bundle": tiny_bundle,
    }


OUTPUTS = {
    "--report {nowhere}/page": "--report {nowhere}/page: no such folder {nowhere}",
    "--log {nowhere}/log": "--log {nowhere}/log: no such folder {nowhere}",
    "--state-out {nowhere}/memory": "--state-out {nowhere}/memory: no such folder {nowhere}",
    "--report {folder}": "--report {folder}: is a folder; name a file",
    "--log {folder}": "--log {folder}: is a folder; name a file",
    "--state-out {folder}": "--state-out {folder}: is a folder; name a file",
    "--report {pipe}": "--report {pipe}: is a pipe, a device or the like; name a file",
    "--log {pipe}": "--log {pipe}: is a pipe, a device or the like; name a file",
    "--state-out {pipe}": "--state-out {pipe}: is a pipe, a device or the like; name a file",
    "--state-out {text}": "--state-out {text}: is the file to score, too; name another",
    "--log {link}": "--log {link}: is the file to score, too; name another",
    "--state-out {new} --log {new}": "--log {new}: is --state-out, too; name another",
    "--report {page} --log {page}": "--log {page}: is --report, too; name another",
    "--state-in {memory} --log {memory}": "--log {memory}: is --state-in, too; name another",
    "--state-in {memory} --state-out {memory} --report {memory}": (
        "--report {memory}: is --state-out, too; name another"
    ),
    "--state-out {bundle}/memory": (
        "--state-out {bundle}/memory: lies in the bundle, which must stay as it is; name another"
    ),
    "--log {bundle}/weights.bin": (
        "--log {bundle}/weights.bin: lies in the bundle, which must stay as it is; name another"
    ),
}


@pytest.mark.parametrize("options", OUTPUTS)
def test_a_file_that_must_not_be_written(
    files: dict[str, Path], tmp_path: Path, titans: Titans, options: str
) -> None:
    before = content_of(tmp_path), content_of(files["bundle"])
    given = [option.format(**files) for option in options.split()]
    message = OUTPUTS[options].format(**files)
    assert titans("run", files["bundle"], files["text"], *given) == (2, f"titans: {message}\n")
    if options.startswith("--state-out") and "--log" not in options and "{text}" not in options:
        command = ("generate", files["bundle"], "--prompt", "a", *given)
        assert titans(*command) == (2, f"titans: {message}\n")
    assert (content_of(tmp_path), content_of(files["bundle"])) == before


def test_the_memory_that_was_read_may_be_written(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = str(files["memory"])
    assert (
        main(
            ["run", *map(str, (files["bundle"], files["text"])), "--state-in", memory, "--state-out", memory]
        )
        == 0
    )
    assert capsys.readouterr().err == ""
    assert tr.load(files["bundle"], threads=1).load_session(memory).position == 2 * len(TEXT)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("inspect", "{nowhere}", "{memory}"), 3, "{nowhere}: cannot be read (No such file or directory)"),
        (("inspect", "{memory}", "{nowhere}"), 3, "{nowhere}: cannot be read (No such file or directory)"),
        (("inspect", "{bundle}", "{memory}"), 2, "inspect {bundle}: is a folder; only memories are compared"),
        (("inspect", "{memory}", "{bundle}"), 2, "inspect {bundle}: is a folder; only memories are compared"),
        (("inspect", "{bundle}", "{bundle}"), 2, "inspect {bundle}: is a folder; only memories are compared"),
        (("inspect", "{memory}", "{text}"), 3, "{text}: no memory file of this project, or damaged"),
        (("bench", "{nowhere}"), 3, "{nowhere}: no bundle; expected a folder with titans.json"),
        (("engine", "{nowhere}"), 3, "{nowhere}: no bundle; expected a folder with titans.json"),
        (("bench", "{bundle}", "--backend", "egaer"), 2, "--backend egaer: unknown; there are "),
        (
            ("bench", "{bundle}", "--beside", "{nowhere}"),
            3,
            "{nowhere}: no bundle; expected a folder with titans.json",
        ),
        (
            ("run", "{bundle}", "{text}", "--backend", "torchscript"),
            3,
            "{bundle}: no graph 'model' for torchscript; export it ",
        ),
        (("run", "{bundle}", "{text}", "--backend", "tensorrt"), 4, ""),
        (("run", "{bundle}", "{text}", "--backend", "onnx"), 2, "backend 'onnx' is unknown; there are "),
        (("export", "{nowhere}", "--out", "{new}"), 3, "{nowhere}/config.json: no readable config "),
        (
            ("import", "titans-pytorch", "{nowhere}", "--out", "{new}"),
            3,
            "{nowhere}: cannot be read (No such ",
        ),
        (
            ("import", "other", "{text}", "--out", "{new}"),
            2,
            "argument library: invalid choice: 'other' (choose from ",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_there(
    files: dict[str, Path], tmp_path: Path, titans: Titans, command: tuple[str, ...], code: int, message: str
) -> None:
    before = content_of(tmp_path), content_of(files["bundle"])
    found, said = titans(*(part.format(**files) for part in command))
    assert found == code
    assert said.startswith(f"titans: {message.format(**files)}")
    assert (content_of(tmp_path), content_of(files["bundle"])) == before
