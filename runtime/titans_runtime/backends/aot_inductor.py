"""Graphs compiled by AOTInductor: native code for one kind of processor, for any number of tokens."""

from __future__ import annotations

import io
import json
import platform
import sys
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from titans_runtime.backends.torchscript import Function, TorchScriptBackend
from titans_runtime.errors import EnvironmentProblem
from titans_runtime.manifest import GraphSpec
from titans_runtime.optional import optional_import

ANY: Final = "model"
ONE: Final = "one_token"
"""Names of compiled models in a file: for any number of tokens and, where it is there, for one."""

_AVX2 = ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
_AVX512 = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")
_NEEDS: Final[Mapping[str, Sequence[str]]] = {
    "AVX2": _AVX2,
    "AVX512": (*_AVX2, *_AVX512),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile", "amx_bf16", "amx_int8"),
}
"""Instructions, by PyTorch's names, that code for a set of them may use."""


class AotInductorBackend(TorchScriptBackend):
    """Runs a bundle's ``aoti/*.pt2`` on the CPU."""

    format: ClassVar = "aoti"

    def _load(self, content: bytes, spec: GraphSpec) -> Function:
        check_processor(content, self._torch.cpu.get_capabilities())
        package = optional_import("torch.export.pt2_archive._package", "torch")
        # One call for all models: ``aoti_load_package`` loads them all, too, and keeps one.
        models = package.load_pt2(io.BytesIO(content)).aoti_runners
        any_number = _Compiled(models[ANY])
        if ONE not in models:
            return any_number
        one = _Compiled(models[ONE])
        place, axis = next(
            (place, tensor.shape.index("tokens"))
            for place, tensor in enumerate(spec.inputs)
            if "tokens" in tensor.shape
        )

        def call(*tensors: Any) -> Sequence[Any]:  # noqa: ANN401 - of a library that is not imported here
            return (one if tensors[place].shape[axis] == 1 else any_number)(*tensors)

        return call


class _Compiled:
    """A compiled model, called without the description of arguments that PyTorch reads at every call."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - torch's
        self._loader = model.loader

    def __call__(self, *tensors: Any) -> Sequence[Any]:  # noqa: ANN401
        results: Sequence[Any] = self._loader.boxed_run(list(tensors))
        return results


def check_processor(content: bytes, capabilities: Mapping[str, Any]) -> None:
    """Refuse code of another kind of machine before it is loaded: it would end the process.

    Args:
        content: of a package.
        capabilities: what ``torch.cpu.get_capabilities`` says of this processor.

    Raises:
        EnvironmentProblem: the message says what is missing here.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as records:
        written = next(name for name in records.namelist() if name.endswith("wrapper_metadata.json"))
        notes = json.loads(records.read(written))
    made_for = f"{notes['AOTI_PLATFORM']} {notes['AOTI_MACHINE']}"
    here = f"{sys.platform} {platform.machine()}"
    if made_for != here:
        raise EnvironmentProblem(
            f"was compiled for {made_for}, and this is {here}; export it here with --format aoti"
        )
    for kind in notes["AOTI_CPU_ISA"].split():
        missing = [name for name in _NEEDS.get(kind, ()) if not capabilities.get(name)]
        if missing:
            raise EnvironmentProblem(
                f"was compiled for processors with {kind}, and this one has no {', '.join(missing)}; "
                "export it here with --format aoti"
            )
