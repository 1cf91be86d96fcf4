"""What the commands ``run``, ``generate``, ``inspect`` and ``verify`` do, and what they print."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import titans_runtime as tr
from tests.runtime.command import TEXT, Titans
from tests.runtime.streams import assert_same_snapshot, change_manifest
from titans_runtime.forward import SEGMENT
from titans_runtime.memories import MemoriesEditor


def _score(model: tr.Model, text: bytes, **settings: Any) -> float:  # noqa: ANN401 - arguments of Model.session
    return tr.score(model.session(**settings), text).bits_per_token


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context"
    path.write_bytes(b"byte by byte, and learns as it goes: " * 3)
    return path


def test_run_prints_one_json_object(titans: Titans, tiny_bundle: Path, text: Path, model: tr.Model) -> None:
    outcome = titans("run", tiny_bundle, text, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(outcome.out.splitlines()) == 1
    fields = outcome.json
    assert fields["bits_per_byte"] == pytest.approx(_score(model, TEXT), abs=1e-4)
    assert fields["bytes"] == fields["position"] == len(TEXT)
    assert fields["edit"] == [0.5, 0.5]
    assert fields["editor"] == tr.Editor(step=0.5).to_dict()
    assert fields["bundle"] == model.manifest.identity
    assert fields["seconds"] >= 0
    assert fields["tokens_per_second"] > 0


def test_run_prints_one_line_a_field_for_people(titans: Titans, tiny_bundle: Path, text: Path) -> None:
    outcome = titans("run", tiny_bundle, text)
    assert outcome.code == 0
    assert outcome.out.splitlines()[0].startswith("bits_per_byte")


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--no-edit"], {"edit": 0.0, "editor": None}),
        (["--edit", "0.25", "--editor", "none"], {"edit": 0.25, "editor": None}),
        (["--edit", "0"], {"edit": 0.0}),
        (["--editor", "readout:step=0.25,chunk=2"], {"editor": tr.Editor(step=0.25, chunk=2)}),
    ],
)
def test_editing_options_are_those_of_the_session(
    titans: Titans,
    tiny_bundle: Path,
    text: Path,
    model: tr.Model,
    options: list[str],
    settings: dict[str, Any],
) -> None:
    fields = titans("run", tiny_bundle, text, "--json", *options).json
    assert fields["bits_per_byte"] == pytest.approx(_score(model, TEXT, **settings), abs=1e-4)
    assert fields["bits_per_byte"] != pytest.approx(_score(model, TEXT), abs=1e-3)


def test_standard_input_is_a_file_named_dash(
    titans: Titans, tiny_bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = titans("run", tiny_bundle, text, "--json").json["bits_per_byte"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT)))
    assert titans("run", tiny_bundle, "-", "--json").json["bits_per_byte"] == expected


@pytest.mark.parametrize("options", [[], ["--no-edit"], ["--edit", "1", "--editor", "readout:chunk=7"]])
def test_two_halves_give_the_bits_of_the_whole(
    titans: Titans, tiny_bundle: Path, text: Path, tmp_path: Path, model: tr.Model, options: list[str]
) -> None:
    memory, half = tmp_path / "memory", 61
    whole = titans("run", tiny_bundle, text, "--json", "--state-out", tmp_path / "whole", *options).json
    text.write_bytes(TEXT[:half])
    first = titans("run", tiny_bundle, text, "--json", "--state-out", memory, *options).json
    text.write_bytes(TEXT[half:])
    second = titans("run", tiny_bundle, text, "--json", "--state-in", memory, "--state-out", memory).json
    assert (second["edit"], second["editor"]) == (whole["edit"], whole["editor"])
    assert second["position"] == len(TEXT)
    total = half * first["bits_per_byte"] + (len(TEXT) - half) * second["bits_per_byte"]
    assert total / len(TEXT) == pytest.approx(whole["bits_per_byte"], abs=2e-4)
    ends = [model.load_session(path).last_logits for path in (memory, tmp_path / "whole")]
    np.testing.assert_allclose(*ends, atol=1e-4)


def test_a_memory_continues_as_the_session_would(
    titans: Titans, tiny_bundle: Path, text: Path, tmp_path: Path, model: tr.Model
) -> None:
    titans("run", tiny_bundle, text, "--state-out", tmp_path / "memory", "--threads", 1)
    session = model.session()
    tr.score(session, TEXT)
    assert_same_snapshot(model.load_session(tmp_path / "memory").snapshot(), session.snapshot())


def test_generate_continues_a_prompt(titans: Titans, tiny_bundle: Path, model: tr.Model) -> None:
    options = ["--prompt", "Once", "--max-new-tokens", "12", "--seed", "3", "--threads", "1"]
    outcome = titans("generate", tiny_bundle, *options)
    session = model.session()
    session.append(b"Once")
    expected = bytes(session.generate(12, 0.8, seed=3)).decode("utf-8", "replace")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == expected + "\n"
    assert titans("generate", tiny_bundle, *options).out == outcome.out


def test_generate_continues_a_memory_and_saves_it(
    titans: Titans, tiny_bundle: Path, tmp_path: Path, text: Path, model: tr.Model
) -> None:
    memory = tmp_path / "memory"
    titans("run", tiny_bundle, text, "--state-out", memory)
    state = ["--state-in", memory, "--state-out", memory]
    outcome = titans("generate", tiny_bundle, "--max-new-tokens", 5, "--learn", *state)
    assert outcome.code == 0
    assert model.load_session(memory).position == len(TEXT) + 5


def test_learning_from_samples_is_asked_for(titans: Titans, tiny_bundle: Path, tmp_path: Path) -> None:
    def readout(*options: str) -> np.ndarray:
        memory = tmp_path / "memory"
        command = ["--prompt", "Once", "--max-new-tokens", 20, "--seed", 1, "--state-out", memory]
        assert titans("generate", tiny_bundle, *command, *options).code == 0
        return load_file(memory)["state.readout"]

    assert not np.array_equal(readout(), readout("--learn"))


def test_a_prompt_may_hold_any_bytes(
    titans: Titans, tiny_bundle: Path, tmp_path: Path, model: tr.Model
) -> None:
    """Bytes of the command line that are no UTF-8 reach Python as surrogates."""
    outcome = titans(
        "generate", tiny_bundle, "--prompt", "\udcff", "--max-new-tokens", 0, "--state-out", tmp_path / "m"
    )
    assert (outcome.code, outcome.out) == (0, "\n")
    expected = model.session().append(b"\xff")[-1]
    np.testing.assert_allclose(model.load_session(tmp_path / "m").last_logits, expected, atol=1e-5)


def test_inspect_describes_a_bundle(titans: Titans, tiny_bundle: Path, model: tr.Model) -> None:
    fields = titans("inspect", tiny_bundle, "--json").json
    assert fields["identity"] == model.manifest.identity
    assert fields["files"].keys() == model.manifest.files.keys()
    buffers = model.session().snapshot().arrays
    assert fields["state_bytes_per_session"] == sum(array.nbytes for array in buffers.values())
    assert titans("inspect", tiny_bundle / "titans.json", "--json").json == fields
    lines = titans("inspect", tiny_bundle).out.splitlines()
    assert any(line.split() == ["identity", model.manifest.identity] for line in lines)


def test_inspect_reads_no_weights(titans: Titans, bundle_copy: Path) -> None:
    size = (bundle_copy / "weights.bin").stat().st_size
    (bundle_copy / "weights.bin").write_bytes(bytes(size))
    assert titans("inspect", bundle_copy).code == 0


def test_inspect_describes_a_memory_file(
    titans: Titans, tiny_bundle: Path, tmp_path: Path, text: Path, model: tr.Model
) -> None:
    titans("run", tiny_bundle, text, "--state-out", tmp_path / "memory")
    fields = titans("inspect", tmp_path / "memory", "--json").json
    assert fields["bundle"] == model.manifest.identity
    assert fields["position"] == len(TEXT)
    assert fields["tensors"]["state.readout"] == [1, 128, 256]
    assert "state.readout" in titans("inspect", tmp_path / "memory").out


def test_verify_passes_and_says_so(titans: Titans, tiny_bundle: Path) -> None:
    outcome = titans("verify", tiny_bundle, "--threads", 1)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith("PASSED: ")
    fields = titans("verify", tiny_bundle, "--json").json
    assert fields["passed"] is True
    assert all(check["error"] <= check["limit"] for check in fields["checks"])


def test_verify_fails_with_code_one_and_names_the_output(titans: Titans, tiny_bundle: Path) -> None:
    outcome = titans("verify", tiny_bundle, "--atol", "logits:0", "--rtol", "0")
    assert outcome.code == 1
    failed = [line for line in outcome.out.splitlines() if line.startswith("✗")]
    assert failed
    assert any(".logits " in line for line in failed)
    fields = titans("verify", tiny_bundle, "--json", "--atol", "0", "--rtol", "0").json
    assert fields["passed"] is False


def test_verify_fails_for_an_altered_golden(titans: Titans, bundle_copy: Path) -> None:
    goldens = load_file(bundle_copy / "goldens.safetensors")
    name = next(name for name in goldens if name.endswith("output.logits"))
    goldens[name][0, 0, 0] += 1
    save_file(goldens, bundle_copy / "goldens.safetensors")
    change_manifest(bundle_copy, lambda content: None, rehash=True)
    outcome = titans("verify", bundle_copy)
    assert outcome.code == 1
    failed = [line.split()[1] for line in outcome.out.splitlines() if line.startswith("✗")]
    assert failed == [name.replace(".output.", ".")]


def test_verify_prints_json_where_a_deviation_is_no_number(titans: Titans, bundle_copy: Path) -> None:
    path = bundle_copy / "goldens.safetensors"
    goldens = load_file(path)
    name = next(name for name in goldens if name.endswith("output.logits"))
    goldens[name] = goldens[name][:, :-1].copy()
    save_file(goldens, path)
    change_manifest(bundle_copy, lambda content: None, rehash=True)
    outcome = titans("verify", bundle_copy, "--json")
    assert outcome.code == 1
    content = json.loads(outcome.out, parse_constant=pytest.fail)
    assert [check["error"] for check in content["checks"] if not check["passed"]] == [None]


def test_run_writes_a_page_and_a_log(tiny_bundle: Path, text: Path, tmp_path: Path, titans: Titans) -> None:
    page, log = tmp_path / "page.html", tmp_path / "log.jsonl"
    outcome = titans("run", tiny_bundle, text, "--report", page, "--log", log, "--json")
    assert outcome.code == 0
    plain = titans("run", tiny_bundle, text, "--no-edit", "--json").json["bits_per_byte"]
    content = page.read_text(encoding="utf-8")
    assert f"<dd>{outcome.json['bits_per_byte']:.3f}</dd>" in content
    assert f"<dd>{plain:.3f}</dd>" in content
    lessons = list(tr.EditLog.load(log))
    assert [lesson.position for lesson in lessons] == list(range(0, len(TEXT) - 4, 4))
    missing = tmp_path / "no" / "page.html"
    assert titans("run", tiny_bundle, text, "--report", missing).err.startswith(
        f"titans: --report {missing}: no"
    )


def test_inspect_compares_two_memories(tiny_bundle: Path, text: Path, tmp_path: Path, titans: Titans) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    titans("run", tiny_bundle, text, "--state-out", before)
    titans("run", tiny_bundle, text, "--state-in", before, "--state-out", after)
    content = titans("inspect", before, after, "--json").json
    editor = tr.Editor(step=0.5).to_dict()
    assert content["memories"] == [
        {"file": str(path), "position": position, "edit": [0.5, 0.5], "editor": editor}
        for path, position in ((before, len(TEXT)), (after, 2 * len(TEXT)))
    ]
    found = {one["name"]: one for one in content["differences"]}
    assert found["state.readout"]["relative"] > 0.01
    shown = titans("inspect", before, before)
    assert shown.code == 0
    lines = shown.out.splitlines()
    for name, place in (("A", 0), ("B", 2)):
        assert lines[place] == f"{name}  {before}: position {len(TEXT):,}, edit 0.5, 0.5"
        assert lines[place + 1] == "   editor readout:step=0.5,chunk=4,optimizer=sgd"
    assert lines[4].split()[0] == "tensor"
    assert all(line.split()[-2:] == ["0.000", "0.0%"] for line in lines[5:])


def test_run_prepares_by_several_passes_over_a_context(
    titans: Titans, tiny_bundle: Path, text: Path, context: Path, tmp_path: Path, model: tr.Model
) -> None:
    memory, log = tmp_path / "memory", tmp_path / "log"
    command = ["run", tiny_bundle, text, "--prepare", context, "--passes", 3, "--threads", 1]
    outcome = titans(*command, "--state-out", memory, "--log", log, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    session = model.session()
    session.log = tr.EditLog()
    reports = session.prepare(context.read_bytes(), 3)
    score = tr.score(session, TEXT)
    fields = outcome.json
    assert fields["bits_per_byte"] == pytest.approx(score.bits_per_token, abs=1e-4)
    assert fields["position"] == len(TEXT) + len(context.read_bytes())
    assert fields["prepared"] == {
        "bytes": len(context.read_bytes()),
        "passes": 3,
        "loss": pytest.approx([report.loss for report in reports], abs=1e-4),
    }
    assert_same_snapshot(model.load_session(memory).snapshot(), session.snapshot())
    assert [one.position for one in tr.EditLog.load(log)] == [one.position for one in session.log]


def test_a_preparation_by_two_editors_tells_the_losses_of_each(
    titans: Titans, tiny_bundle: Path, text: Path, context: Path, model: tr.Model
) -> None:
    editor = "readout:step=0.5+association:chunk=8"
    options = ["--prepare", context, "--passes", 2, "--threads", 1, "--edit", 0, "--editor", editor]
    prepared = titans("run", tiny_bundle, text, *options, "--json").json["prepared"]
    session = model.session(edit=0.0, editor=tr.Editor.parse(editor))
    reports = session.prepare(context.read_bytes(), 2)
    assert prepared["loss"] == prepared["losses"]["readout"]
    assert prepared["losses"] == {
        name: pytest.approx([report.losses[name] for report in reports], abs=1e-3)
        for name in ("readout", "association")
    }


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_run_that_fails_keeps_its_log_and_names_the_place(
    with_memory: bool, titans: Titans, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place is one of the file, whatever the memory has seen before."""
    long, log, memory = tmp_path / "long", tmp_path / "log", tmp_path / "memory"
    long.write_bytes(TEXT * (3 * SEGMENT // len(TEXT)))
    editor = ["--editor", "prediction:chunk=64,step=0.01"]
    if with_memory:
        (tmp_path / "short").write_bytes(TEXT)
        assert titans("run", tiny_bundle, tmp_path / "short", *editor, "--state-out", memory).code == 0
    options = ["--state-in", memory] if with_memory else editor
    _break_lessons_from(len(TEXT) * with_memory + SEGMENT + 100, monkeypatch)
    outcome = titans("run", tiny_bundle, long, *options, "--log", log)
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith(
        f"titans: long: in the call that began at byte {SEGMENT:,}: after a step of predic"
    )
    assert line.endswith(f"; {log} has the lessons before it")
    lessons = list(tr.EditLog.load(log))
    assert [one.tokens for one in lessons][1:] == [64] * (len(lessons) - 1)
    assert lessons[-1].position + 64 <= SEGMENT + len(TEXT) * with_memory
    assert len(lessons) >= SEGMENT // 64 - 1


def _break_lessons_from(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, evaluate = MemoriesEditor._learn, MemoriesEditor._evaluate
    where = [0]

    def noted(editor: MemoriesEditor, at: int, report: tr.EditReport) -> None:
        where[0] = at
        learn(editor, at, report)

    def broken(editor: MemoriesEditor, *given: Any) -> dict[str, Any]:  # noqa: ANN401
        found = evaluate(editor, *given)
        if where[0] >= position:
            found["grad.layers.0.memory"][:] = np.nan
        return found

    monkeypatch.setattr(MemoriesEditor, "_learn", noted)
    monkeypatch.setattr(MemoriesEditor, "_evaluate", broken)


def test_ctrl_c_in_a_run_keeps_its_log(
    titans: Titans, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, log = tmp_path / "long", tmp_path / "log"
    long.write_bytes(TEXT * (3 * SEGMENT // len(TEXT)))
    append, calls = tr.Session.append, iter(range(9))

    def interrupted(self: tr.Session, tokens: Any) -> Any:  # noqa: ANN401
        if next(calls) == 1:
            raise KeyboardInterrupt
        return append(self, tokens)

    monkeypatch.setattr(tr.Session, "append", interrupted)
    outcome = titans("run", tiny_bundle, long, "--log", log)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, "titans: interrupted")
    assert [one.position for one in tr.EditLog.load(log)] == list(range(0, SEGMENT - 4, 4))


def test_a_run_that_fails_before_its_first_lesson_leaves_an_older_log(
    titans: Titans, tiny_bundle: Path, text: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("older")
    outcome = titans("run", tiny_bundle, text, "--editor", "association:step=1e6,chunk=8", "--log", log)
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith(
        f"titans: {text.name}: in the call that began at byte 0: after a step of association"
    )
    assert line.endswith("; the session is as it was before the call")
    assert log.read_text() == "older"


def test_generate_continues_a_context(
    titans: Titans, tiny_bundle: Path, context: Path, model: tr.Model
) -> None:
    options = ["--max-new-tokens", 12, "--seed", 3, "--threads", 1]
    outcome = titans("generate", tiny_bundle, "--prepare", context, "--passes", 2, *options)
    session = model.session()
    session.prepare(context.read_bytes(), 2)
    assert outcome.out == bytes(session.generate(12, 0.8, seed=3)).decode("utf-8", "replace") + "\n"


def test_the_page_of_a_prepared_run_compares_with_reading_alone(
    titans: Titans, tiny_bundle: Path, text: Path, context: Path, tmp_path: Path, model: tr.Model
) -> None:
    page = tmp_path / "page.html"
    titans("run", tiny_bundle, text, "--prepare", context, "--passes", 3, "--report", page)
    plain = model.session(edit=0.0, editor=None)
    plain.append(context.read_bytes())
    content = page.read_text(encoding="utf-8")
    assert f"<dd>{tr.score(plain, TEXT).bits_per_token:.3f}</dd>" in content
    assert f"<dd>3 × {len(context.read_bytes())} bytes</dd>" in content
    chart = content[content.index("gradient norm of every lesson") :]
    points = [float(x) for x in re.findall(r"([0-9.]+),[0-9.]+", chart[: chart.index("</svg>")])]
    assert min(points) < 20, "the first lesson stands at the beginning of the text"
    assert max(points) <= 960


def test_a_bundle_that_recommends_no_editing_says_so(titans: Titans, bundle_copy: Path, text: Path) -> None:
    change_manifest(bundle_copy, lambda content: content["recommended"].update(edit=0.0, editor=None))
    outcome = titans("run", bundle_copy, text)
    assert outcome.code == 0
    assert (
        outcome.err
        == "titans: this bundle recommends no editing, so nothing is learnt; try --editor readout\n"
    )
    for options in (("--no-edit",), ("--editor", "readout"), ("--edit", 1)):
        assert titans("run", bundle_copy, text, *options).err == ""


def test_what_would_learn_nothing_is_refused(
    titans: Titans, tiny_bundle: Path, text: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    for command in (
        ("run", tiny_bundle, text, "--no-edit", "--log", log),
        ("generate", tiny_bundle, "--prompt", "a", "--no-edit", "--learn"),
    ):
        outcome = titans(*command)
        assert outcome.code == 2
        assert "nothing would learn; give an editor, as in --editor readout" in outcome.err
    assert not log.exists()
