"""The command ``titans`` as a program: help, exit codes, and how it refuses."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import titans_runtime as tr
from tests.runtime.command import TEXT, Titans

USAGE = {
    "no such command": ["fly"],
    "no such option": ["run", "{bundle}", "{text}", "--fast"],
    "argument missing": ["run", "{bundle}"],
    "not a number": ["run", "{bundle}", "{text}", "--edit", "much"],
    "edit out of range": ["run", "{bundle}", "{text}", "--edit", "2"],
    "edit NaN": ["run", "{bundle}", "{text}", "--edit", "nan"],
    "editor malformed": ["run", "{bundle}", "{text}", "--editor", "readout:step"],
    "editor unknown": ["run", "{bundle}", "{text}", "--editor", "other"],
    "no edit and edit": ["run", "{bundle}", "{text}", "--no-edit", "--edit", "1"],
    "no edit and editor": ["run", "{bundle}", "{text}", "--no-edit", "--editor", "none"],
    "memory and edit": ["run", "{bundle}", "{text}", "--state-in", "{memory}", "--edit", "1"],
    "threads": ["run", "{bundle}", "{text}", "--threads", "0"],
    "too many threads": ["run", "{bundle}", "{text}", "--threads", "100000"],
    "too many threads to verify with": ["verify", "{bundle}", "--threads", "100000"],
    "too many threads to time": ["bench", "{bundle}", "-t", "1,100000"],
    "state-out nowhere": ["run", "{bundle}", "{text}", "--state-out", "{nowhere}/memory"],
    "state-out is a folder": ["run", "{bundle}", "{text}", "--state-out", "{bundle}"],
    "no prompt": ["generate", "{bundle}"],
    "temperature": ["generate", "{bundle}", "--prompt", "a", "--temperature", "-1"],
    "top-p": ["generate", "{bundle}", "--prompt", "a", "--top-p", "0"],
    "top-k": ["generate", "{bundle}", "--prompt", "a", "--top-k", "-2"],
    "seed": ["generate", "{bundle}", "--prompt", "a", "--seed", "-1"],
    "tokens": ["generate", "{bundle}", "--prompt", "a", "--max-new-tokens", "-1"],
    "passes over nothing": ["run", "{bundle}", "{text}", "--passes", "2"],
    "no passes": ["run", "{bundle}", "{text}", "--prepare", "{text}", "--passes", "0"],
    "two standard inputs": ["run", "{bundle}", "-", "--prepare", "-"],
    "prepare without an editor": ["run", "{bundle}", "{text}", "--prepare", "{text}", "--no-edit"],
    "generate, passes over nothing": ["generate", "{bundle}", "--prompt", "a", "--passes", "2"],
    "prepare is overwritten": [
        "run",
        "{bundle}",
        "{damaged}/titans.json",
        "--prepare",
        "{text}",
        "--log",
        "{text}",
    ],
    "tolerance": ["verify", "{bundle}", "--atol", "logits:small"],
    "tolerance NaN": ["verify", "{bundle}", "--atol", "nan"],
    "tolerance below 0": ["verify", "{bundle}", "--rtol", "-1"],
    "tolerance of nothing": ["verify", "{bundle}", "--atol", "logit:1"],
}
DATA = {
    "no bundle": ["run", "{nowhere}", "{text}"],
    "no file": ["run", "{bundle}", "{nowhere}"],
    "file is a folder": ["run", "{bundle}", "{bundle}"],
    "empty file": ["run", "{bundle}", "{empty}"],
    "no memory": ["run", "{bundle}", "{text}", "--state-in", "{nowhere}"],
    "nothing to prepare with": ["run", "{bundle}", "{text}", "--prepare", "{nowhere}"],
    "empty context": ["generate", "{bundle}", "--prepare", "{empty}"],
    "damaged memory": ["run", "{bundle}", "{text}", "--state-in", "{text}"],
    "inspect nothing": ["inspect", "{nowhere}"],
    "inspect text": ["inspect", "{text}"],
    "inspect empty": ["inspect", "{empty}"],
    "verify nothing": ["verify", "{nowhere}"],
    "verify a folder": ["verify", "{folder}"],
    "damaged bundle": ["verify", "{damaged}"],
}
ENVIRONMENT = {
    "provider": ["run", "{bundle}", "{text}", "--provider", "CPUExecutionProvidr"],
    "provider of verify": ["verify", "{bundle}", "--provider", "Cuda"],
    "provider of generate": ["generate", "{bundle}", "--prompt", "a", "--provider", "Cuda"],
}
REFUSALS = [
    pytest.param(command, code, id=name)
    for code, commands in ((2, USAGE), (3, DATA), (4, ENVIRONMENT))
    for name, command in commands.items()
]


@pytest.mark.parametrize("command", [["verify"], ["generate", "--prompt", "ä", "--seed", "1"]])
def test_a_terminal_without_unicode_gets_question_marks(tiny_bundle: Path, command: list[str]) -> None:
    arguments = [sys.executable, "-m", "titans_runtime", command[0], str(tiny_bundle), *command[1:]]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(arguments, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout


def test_without_a_command_help_is_printed(titans: Titans) -> None:
    outcome = titans()
    assert outcome.code == 0
    for command in ("run", "generate", "inspect", "verify"):
        assert command in outcome.out


def test_the_version_is_the_packages(titans: Titans) -> None:
    assert titans("--version").out == f"titans {tr.__version__}\n"


@pytest.mark.parametrize(("command", "code"), REFUSALS)
def test_a_users_mistake_is_at_most_two_lines_and_a_code(
    titans: Titans, bundle_copy: Path, tiny_bundle: Path, tmp_path: Path, command: list[str], code: int
) -> None:
    (bundle_copy / "weights.bin").write_bytes(b"")
    paths = {name: tmp_path / name for name in ("text", "empty", "nowhere", "folder")}
    paths["text"].write_bytes(TEXT)
    paths["empty"].touch()
    paths["folder"].mkdir()
    paths |= {"bundle": tiny_bundle, "damaged": bundle_copy, "memory": tmp_path / "memory"}
    outcome = titans(*(argument.format(**paths) for argument in command))
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert 1 <= len(lines) <= 2
    assert all(line.startswith("titans: ") for line in lines)
    assert "Traceback" not in outcome.err


def test_empty_standard_input_is_refused(
    titans: Titans, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    outcome = titans("run", tiny_bundle, "-")
    assert (outcome.code, outcome.err) == (3, "titans: -: is empty; give at least one byte\n")


def test_a_disk_that_is_full_is_a_matter_of_the_machine(
    titans: Titans, tiny_bundle: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    outcome = titans("run", tiny_bundle, text, "--state-out", tmp_path / "memory")
    assert outcome.code == 4
    assert outcome.err == f"titans: {tmp_path}/memory: cannot be written (No space left on device)\n"
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")],
    ids=["of Python", "of PyTorch"],
)
def test_a_machine_without_memory_is_one_line(
    titans: Titans, tiny_bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhausted(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(tr.Session, "append", exhausted)
    outcome = titans("run", tiny_bundle, text)
    assert (outcome.code, outcome.out) == (4, "")
    assert outcome.err == "titans: out of memory; free some, or use a smaller model or file\n"


def test_ctrl_c_is_one_line(
    titans: Titans, tiny_bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tr.Session, "append", interrupt)
    outcome = titans("run", tiny_bundle, text)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "titans: interrupted\n")


@pytest.mark.parametrize("module", ["numpy", "titans_runtime", "argparse", "titans_runtime.bench.options"])
def test_ctrl_c_while_the_command_loads_is_one_line(module: str) -> None:
    """From the console script, at whatever it imports."""
    program = f"""if True:
        import sys
        class Interrupt:
            def find_spec(self, name, *arguments):
                if name == {module!r}:
                    raise KeyboardInterrupt
        sys.modules.pop({module!r}, None)
        sys.meta_path.insert(0, Interrupt())
        from titans_command import main
        sys.exit(main())"""
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"titans: interrupted\n")


def test_ctrl_c_while_the_commands_are_looked_up_is_one_line(
    titans: Titans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("titans_runtime.cli.entry_points", interrupt)
    outcome = titans("--version")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "titans: interrupted\n")


def test_a_reader_that_leaves_is_no_error(tiny_bundle: Path) -> None:
    """`titans generate … | head -c 1`, in a process of its own because it closes standard output."""
    options = ["--prompt", "a", "--max-new-tokens", "50", "--seed", "1"]
    command = [sys.executable, "-m", "titans_runtime", "generate", str(tiny_bundle), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert errors == b""
