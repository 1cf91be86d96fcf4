"""Whatever bytes a manifest or a memory file holds: the documented error, in time, and in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.crashes import forked
from tests.runtime import fuzz_targets
from titans_runtime.json_reader import MAX_BYTES
from titans_runtime.manifest import Manifest
from titans_runtime.state import load_snapshot

ROOT = Path(__file__).parents[2]
MEMORY_BOUND = 512 * 2**20
"""What reading a manifest, or a memory file's header, takes at most, beside the tensors."""


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 6))
def test_changed_json_is_read_or_refused(target: str, seed: int, changes: int) -> None:
    choice = random.Random(seed)
    data = choice.choice(fuzz_targets.seeds(target))
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):  # no JSON any more
        for _ in range(changes):
            data = fuzz_targets.changed(data, target, choice)
    fuzz_targets.TARGETS[target](data)


def test_the_valid_inputs_are_valid(tmp_path: Path) -> None:
    """Else the fuzzer would begin, and stay, outside."""
    for seed in fuzz_targets.seeds("manifest"):
        assert Manifest.from_dict(json.loads(seed[1:])) == fuzz_targets.MANIFEST
    for seed in fuzz_targets.seeds("memory"):
        (tmp_path / "memory").write_bytes(seed[1:])
        assert load_snapshot(tmp_path / "memory", fuzz_targets.MANIFEST).position == 2


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_each_valid_input_goes_the_whole_way(target: str) -> None:
    """What chance may leave out: a change seldom leaves a memory valid."""
    for seed in fuzz_targets.seeds(target):
        fuzz_targets.TARGETS[target](seed)


@pytest.mark.suite("fuzz")
@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_a_coverage_guided_fuzzer_finds_nothing(target: str, tmp_path: Path) -> None:
    """100,000 inputs, or ten minutes."""
    pytest.importorskip("atheris", reason="pip install -c constraints.txt -e '.[fuzz]'")
    command = [sys.executable, "-m", "tests.runtime.fuzz", target, "-runs=100000", "-max_total_time=600"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Done " in done.stderr, done.stderr[-5000:]


# --- memory


_WORST = {
    "empty objects": b"{},",
    "empty lists": b"[],",
    "objects": b'{"":0},',
    "floats": b"1e9,",
    "texts": '"\u00ff",'.encode(),
    "nested": b"[[[[[[[[[[[]]]]]]]]]]],",
}


@pytest.mark.suite("fuzz")
@pytest.mark.parametrize("unit", _WORST.values(), ids=_WORST.keys())
@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_the_worst_json_takes_no_more_than_stated(target: str, unit: bytes) -> None:
    text = b'{"a":[' + unit * ((MAX_BYTES - 20) // len(unit)) + b"0]}"
    json.loads(text)
    head = b"\0" if target == "manifest" else b"\0" + len(text).to_bytes(8, "little")

    def bounded() -> None:
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BOUND, used + MEMORY_BOUND))
        fuzz_targets.TARGETS[target](head + text)

    assert os.waitpid(forked(bounded), 0)[1] == 0
