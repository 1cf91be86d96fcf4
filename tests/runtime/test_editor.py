"""An editor's forms: constructor, command line and JSON."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_runtime import Editor, UsageError
from titans_runtime.editor import MAX_CHUNK, decays, specification
from titans_runtime.optimizers import OPTIMIZERS, Step

editors = st.builds(
    Editor,
    objective=st.just("readout"),
    step=st.floats(0, 1e6, allow_nan=False),
    chunk=st.integers(1, MAX_CHUNK),
)


@given(editor=editors)
def test_json_and_command_line_give_the_same_editor(editor: Editor) -> None:
    assert Editor.from_dict(editor.to_dict()) == editor
    assert Editor.parse(f"readout:step={editor.step!r},chunk={editor.chunk}") == editor


def test_settings_that_are_left_out_take_their_defaults() -> None:
    assert Editor.parse("readout") == Editor()
    assert Editor.parse("readout:chunk=7") == Editor(chunk=7)
    assert Editor.from_dict({}) == Editor()


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("readout", 1.0),
        ("readout:optimizer=adagrad", 1.0),
        ("prediction", 0.1),
        ("association", 1e-4),
        ("other", 1.0),
        ("association:optimizer=titans", 1.0),
        ("prediction:optimizer=adam", 0.01),
    ],
)
def test_the_step_that_is_left_out_is_that_of_objective_and_optimizer(text: str, step: float) -> None:
    editor = Editor.parse(text)
    assert editor.step == step
    assert editor == Editor.from_dict(editor.to_dict())
    assert editor.to_dict()["step"] == step, "a memory file says it, whatever defaults may become"
    assert Editor(editor.objective, optimizer=editor.optimizer, step=None) == editor
    assert Editor.parse(f"{text}{',' if ':' in text else ':'}step=0.3").step == 0.3


def test_the_objective_names_the_graph() -> None:
    assert Editor().graph == "gradient.readout"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "An other"}, "objective 'An other'; known: readout, prediction, association"),
        ({"objective": None}, "objective None; known: readout"),
        ({"optimizer": "rprop"}, "optimizer 'rprop'; known: sgd, adagrad, titans, adam, muon"),
        ({"optimizer": "adam"}, "optimizer 'adam': the objective readout has sgd and adagrad"),
        ({"momentum": 0.5}, "momentum: the objective readout has none"),
        ({"retention": -0.1}, "retention is -0.1; it must be a number from 0 to 1"),
        ({"objective": "prediction", "floor": 0.5}, "floor: the optimizer sgd has none"),
        (
            {"objective": "prediction", "optimizer": "adam", "momentum": 1},
            "momentum is 1; of adam it must be a number from 0 to 0.9999",
        ),
        (
            {"objective": "prediction", "optimizer": "adagrad", "momentum": 0},
            "the optimizer adagrad has none",
        ),
        (
            {"objective": "prediction", "optimizer": "muon", "momentum": 0.99999},
            "momentum is 0.99999; of muon it must be a number from 0 to 0.9999",
        ),
        ({"objective": "prediction", "retention": 1.5}, "retention is 1.5; it must be a number from 0 to 1"),
        ({"objective": "prediction", "memories": "layers.0"}, "memories is 'layers.0'; give a tuple"),
        ({"rollback": 1}, "rollback is 1; it must be true or false"),
        ({"steps": 0}, "steps is 0; it must be an integer from 1 to 1000"),
        ({"also": {"objective": "readout"}}, "one of the two edits readout"),
        ({"also": 3}, "also is 3; it must be an object"),
        ({"step": -0.5}, r"step is -0.5; it must be a number from 0 to 1e\+06"),
        ({"step": 1e7}, "step is 10000000.0"),
        ({"step": math.nan}, "step is nan"),
        ({"step": math.inf}, "step is inf"),
        ({"step": "1"}, "step is '1'"),
        ({"step": None}, "step is null; leave it out, or give a number"),
        ({"step": True}, "step is True"),
        ({"chunk": 0}, "chunk is 0; it must be an integer from 1 to 1024"),
        ({"chunk": MAX_CHUNK + 1}, "chunk is 1025"),
        ({"chunk": 4.0}, "chunk is 4.0"),
        ({"chunk": True}, "chunk is True"),
        ({"pace": 1}, "field 'pace' is unknown; known: objective, step, chunk"),
    ],
)
def test_values_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Editor.from_dict(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "objective ''; known: readout"),
        ("Readout:step=1", "objective 'Readout'"),
        ("readout+prediction+association", "two editors at most"),
        ("prediction:rollback=yes", "rollback is 'yes'; it must be true or false"),
        ("readout:step", "'step' is not NAME=VALUE"),
        ("readout:step=", "step is ''; it must be a number"),
        ("readout:step=fast", "--editor readout:step=fast: step is 'fast'; it must be a number"),
        ("readout:chunk=4.5", "chunk is '4.5'; it must be an integer"),
        ("readout:pace=4", "'pace' is unknown; known: step, chunk"),
        ("readout:step=nan", "step is nan"),
        ("readout:chunk=0", "chunk is 0"),
        ("readout:step=1,step=2", "step"),
        ("readout:objective=1", "objective"),
    ],
)
def test_malformed_text_is_refused_and_the_part_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Editor.parse(text)


@pytest.mark.parametrize("given", [None, 5, b"readout", Editor()])
def test_what_is_no_text_and_no_object_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match=r"^editor is .*; give a text, as in 'readout:step=1,chunk=4'$"):
        Editor.parse(given)  # type: ignore[arg-type]
    for other in (given, "readout", ["readout"]):
        with pytest.raises(UsageError, match=r"^editor is .*; give an object with its fields"):
            Editor.from_dict(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gradient", [0.0, 1e-30, 1.0])
def test_every_optimizer_takes_the_ends_of_all_its_ranges(optimizer: str, gradient: float) -> None:
    """Whatever an editor may be made with, two steps are finite numbers and no exception."""
    ends = {"momentum": (None, 0.0, 0.9999, 1.0), "retention": (None, 0.0, 1.0), "floor": (0.0, 1.0)}
    combinations = [dict(zip(ends, chosen, strict=True)) for chosen in itertools.product(*ends.values())]
    made = 0
    for settings in combinations:
        try:
            editor = Editor("prediction", optimizer=optimizer, **settings)
        except UsageError:
            continue
        made += 1
        rule = OPTIMIZERS[optimizer](size=editor.step, **decays(editor))
        value = np.ones((1, 2, 3), np.float32)
        moments = {name: np.zeros_like(value) for name in rule.moments}
        for count in range(2):
            given = Step(np.full_like(value, gradient), moments, count)
            value, moments = rule.step(value, given)
        assert np.isfinite(value).all()
    assert made


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, np.uint8])
def test_numpy_scalars_are_kept_as_numbers_of_python(kind: type[np.generic]) -> None:
    editor = Editor(step=kind(1), chunk=np.int32(8), steps=np.uint8(2), budget=kind(3))
    assert editor == Editor(step=1, chunk=8, steps=2, budget=3)
    assert {type(editor.step), type(editor.budget)} <= {int, float}
    assert (type(editor.chunk), type(editor.steps)) == (int, int)
    json.dumps(editor.to_dict())


@pytest.mark.parametrize("step", [np.float64("nan"), np.float32(-1), np.bool_(True), np.complex64(1)])
def test_numpy_scalars_outside_the_range_are_refused(step: np.generic) -> None:
    with pytest.raises(UsageError, match=r"editor step is .*; it must be a number from 0 to"):
        Editor(step=step)
    with pytest.raises(UsageError, match=r"editor chunk is 4\.0; it must be an integer"):
        Editor(chunk=np.float64(4))


@pytest.mark.parametrize(
    "editor",
    [
        Editor(),
        Editor(
            "prediction", step=0.25, optimizer="adam", momentum=0.5, memories=("layers.0.*", "layers.1.*")
        ),
        Editor(
            chunk=8, rollback=True, steps=2, also=Editor("association", step=1e-5, replace=True, clip=1.5)
        ),
    ],
)
def test_the_text_of_an_editor_is_read_as_that_editor(editor: Editor) -> None:
    assert Editor.parse(specification(editor.to_dict())) == editor


def test_the_second_editor_may_be_text() -> None:
    assert Editor(also="prediction:step=0.5") == Editor.parse("readout+prediction:step=0.5")
    for wrong, message in (
        (5, r"also is 5; give an Editor"),
        ({"objective": "prediction"}, r"also is \{'objective': 'prediction'\}; give an Editor"),
        ("prediction:pace=1", "'pace' is unknown"),
        ("readout", "one of the two edits readout"),
        ("prediction+readout", "give one editor without a third"),
    ):
        with pytest.raises(UsageError, match=message):
            Editor(also=wrong)


def test_two_editors_side_by_side() -> None:
    text = "readout:step=1e-2,chunk=8+prediction:step=1e+0,optimizer=adam,memories=layers.0.*|layers.1.*"
    editor = Editor.parse(text)
    readout, prediction = editor.parts
    assert (readout.objective, prediction.objective) == ("readout", "prediction")
    assert prediction.memories == ("layers.0.*", "layers.1.*")
    assert Editor.from_dict(json.loads(json.dumps(editor.to_dict()))) == editor
