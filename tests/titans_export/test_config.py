"""A config that no model can have is refused where it is made, with the field's name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_export.config import ARCHITECTURES, PRESETS, ModelConfig, overridden
from titans_runtime.errors import DataError, UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back(name: str) -> None:
    config = PRESETS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "mab"}, "architecture is 'mab'; known: lmm, mac, mag, mal"),
        ({"layers": 0}, "layers is 0; it must be 1 or more"),
        ({"layers": 10**23}, "layers is 1[0]{23}; it must be 1024 or less"),
        ({"d_model": 10**9}, "d_model is 1000000000; it must be 65536 or less"),
        ({"readout_buckets": 10**9}, "readout_buckets is 1000000000; it must be 16777216 or less"),
        ({"readout_contexts": [2, 10**9]}, "readout_contexts holds 1000000000; at most 1024 each"),
        (
            {"d_model": 60_000, "d_ff": 60_000},
            r"about 1.8e\+10 weights and numbers of a memory; at most 4.3e\+09",
        ),
        ({"period": 0}, "period is 0"),
        ({"segment": -1}, "segment is -1"),
        ({"persistent": 0}, "persistent is 0"),
        ({"memory_depth": 5, "learned_memory": True}, "memory_depth is 5; it must be 0 to 4"),
        ({"memory_depth": 2}, "a deep memory begins with learned weights; set learned_memory"),
        ({"window": 1}, "window is 1"),
        ({"readout_words": [-1]}, r"readout_words is \[-1\]; they must be 0 or more"),
        ({"readout_words": [1], "vocab_size": 64}, "readout_words need a vocabulary of 256 bytes"),
        ({"conv_kernel": 1}, "conv_kernel is 1"),
        ({"architecture": "mag", "head_dim": 15}, "head_dim is 15; rotary positions need an even one"),
        (
            {"architecture": "mac", "segment": 8, "period": 3},
            "segment is 8, no multiple of the gradient period 3",
        ),
    ],
)
def test_what_no_model_can_have(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(PRESETS["tiny"], **_with_tuples(fields))
    with pytest.raises(DataError, match=message):
        ModelConfig.from_dict(PRESETS["tiny"].to_dict() | fields)


def _with_tuples(fields: dict[str, object]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("momentum", 1),
        ("layers", True),
        ("layers", 2.0),
        ("architecture", 3),
        ("readout_contexts", [2, "3"]),
        ("readout_words", [True]),
    ],
)
def test_types_are_exact(field: str, value: object) -> None:
    with pytest.raises(DataError, match=f"config: {field} is "):
        ModelConfig.from_dict({field: value})


@given(st.sampled_from(ARCHITECTURES), st.booleans(), st.integers(1, 64))
def test_settings_replace_fields(architecture: str, momentum: bool, period: int) -> None:
    settings = [f"architecture={architecture}", f"momentum={json.dumps(momentum)}", f"period={period}"]
    if architecture == "mac":
        settings.append(f"segment={2 * period}")
    config = overridden(PRESETS["nano"], settings)
    assert (config.architecture, config.momentum, config.period) == (architecture, momentum, period)
    assert config.d_model == PRESETS["nano"].d_model


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("momentum", "--set momentum: expected FIELD=VALUE"),
        ("pace=3", "unknown field 'pace'"),
        ("momentum=no", "momentum is 'no'; expected bool"),
        ("period=0", "period is 0"),
    ],
)
def test_settings_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        overridden(PRESETS["nano"], [setting])
