"""Code that was compiled for another machine is refused before it is loaded."""

from __future__ import annotations

import io
import json
import platform
import sys
import zipfile

import pytest

from titans_runtime.backends.aot_inductor import check_processor
from titans_runtime.errors import EnvironmentProblem

AVX2 = dict.fromkeys(("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt"), True)
AVX512 = AVX2 | dict.fromkeys(("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"), True)


def package(**notes: str) -> bytes:
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine(), "AOTI_CPU_ISA": "AVX2"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as records:
        records.writestr("graph/data/aotinductor/model/abc.wrapper_metadata.json", json.dumps(here | notes))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("needs", "has"),
    [("AVX2", AVX2), ("AVX2", AVX512), ("AVX512", AVX512), ("NEON", {}), ("INVALID_VEC_ISA", {})],
)
def test_code_for_this_machine_or_a_lesser_one(needs: str, has: dict[str, bool]) -> None:
    check_processor(package(AOTI_CPU_ISA=needs), has)


@pytest.mark.parametrize(
    ("notes", "reason"),
    [
        ({"AOTI_CPU_ISA": "AVX512"}, "with AVX512, and this one has no avx512_f, "),
        ({"AOTI_CPU_ISA": "AVX2 AVX512_VNNI"}, "has no avx512_vnni; export it here"),
        ({"AOTI_MACHINE": "pdp11"}, "pdp11, and this is"),
        ({"AOTI_PLATFORM": "plan9"}, "for plan9 "),
    ],
)
def test_code_for_another(notes: dict[str, str], reason: str) -> None:
    with pytest.raises(EnvironmentProblem, match=reason):
        check_processor(package(**notes), AVX2)
