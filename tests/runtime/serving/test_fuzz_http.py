"""The server under schemathesis: whatever its own OpenAPI document allows, and what it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.serving.conftest import ANNA
from tests.runtime.serving.processes import Served

pytestmark = pytest.mark.suite("schemathesis")


@pytest.mark.parametrize("with_tokens", [False, True])
def test_every_answer_is_documented_and_none_is_a_crash(
    tiny_bundle: Path, tmp_path: Path, tokens: Path, with_tokens: bool
) -> None:
    options = ["--tokens", str(tokens)] if with_tokens else []
    server = Served(tiny_bundle, tmp_path, "--max-tokens", "20", "--max-memories", "30", *options)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    command += ["--max-examples", "25", "--seed", "1", "--workers", "1", "--request-timeout", "60"]
    # A generated id is that of no memory most of the time: rejecting it is no fault of the document.
    command += ["--exclude-checks", "positive_data_acceptance,unsupported_method,missing_required_header"]
    if with_tokens:
        command += ["--header", f"Authorization: Bearer {ANNA}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    code, said = server.end(15)
    assert done.returncode == 0, done.stdout[-6000:]
    assert code == 0
    assert "Traceback" not in said
