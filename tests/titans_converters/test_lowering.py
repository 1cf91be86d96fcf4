"""The memory as ONNX Runtime's own operator, against the float64 token loop; and bodies without functions."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from titans_converters import memory_op
from titans_converters.onnx.lowering import linear_attention_node, lower
from titans_converters.onnx.trace import memory_node, to_proto, trace
from titans_converters.program import Axes, Program
from titans_export.memory import MemoryRule, token_loop

BATCH, HEADS, DIM = 3, 2, 16
AXES: dict[str, Axes] = {
    **dict.fromkeys(memory_op.INPUTS[:3], ("batch", HEADS, "tokens", DIM)),
    **dict.fromkeys(memory_op.INPUTS[3:6], ("batch", HEADS, "tokens")),
    "edit": ("batch",),
    "past_memory": ("batch", HEADS, DIM, DIM),
    "past_momentum": ("batch", HEADS, DIM, DIM),
}
OUTPUTS = {
    "output": AXES["query"],
    "present_memory": AXES["past_memory"],
    "present_momentum": AXES["past_momentum"],
}


class _Rule(nn.Module):
    def __init__(self, rule: MemoryRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        e: Tensor,
        s: Tensor,
        x: Tensor,
        m: Tensor,
        p: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, memory, momentum = self.rule(q, k, v, a, e, s, x, m, p, tile=8)
        return output, memory, momentum * 1.0  # no output is an input


def _program(rule: MemoryRule) -> Program:
    sizes = {"batch": 5, "tokens": 37}
    inputs = {
        name: torch.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in axes])
        for name, axes in AXES.items()
    }
    return Program("rule", _Rule(rule), inputs, AXES, OUTPUTS)


def _session(rule: MemoryRule, scan: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        to_proto(lower(trace(_program(rule)), scan)).SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="module")
def native() -> onnxruntime.InferenceSession:
    return _session(linear_attention_node, "native")


def _inputs(tokens: int, gates: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, key, value = (normal(BATCH, HEADS, tokens, DIM) for _ in range(3))
    shape = (BATCH, HEADS, tokens)
    log_retention = nn.functional.logsigmoid(3 + normal(*shape))
    step = torch.sigmoid(normal(*shape))
    if gates == "shut":
        log_retention[:, 0] = float("-inf")
    if gates == "open":
        log_retention.zero_()
    if gates == "no step":
        step.zero_()
    if gates == "one key":
        key = key[:, :, :1].expand_as(key).clone()
        step.fill_(1.0)
    return {
        "query": nn.functional.normalize(query, dim=-1),
        "key": nn.functional.normalize(key, dim=-1),
        "value": value,
        "log_retention": log_retention,
        "log_momentum": torch.full(shape, float("-inf")),
        "step": step,
        "edit": torch.tensor([0.0, 0.37, 1.0]),
        "past_memory": normal(BATCH, HEADS, DIM, DIM),
        "past_momentum": torch.zeros(BATCH, HEADS, DIM, DIM),
    }


@pytest.mark.parametrize("gates", ["lively", "shut", "open", "no step", "one key"])
@pytest.mark.parametrize("tokens", [1, 5, 33, 150])
def test_native_is_the_rule_for_every_strength(
    native: onnxruntime.InferenceSession, tokens: int, gates: str
) -> None:
    """Rows with λ of 0, 0.37 and 1, in one batch."""
    inputs = _inputs(tokens, gates)
    expected = token_loop(*(tensor.double() for tensor in inputs.values()))
    actual = native.run(["output", "present_memory"], {name: x.numpy() for name, x in inputs.items()})
    for found, wanted in zip(actual, expected[:2], strict=True):
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * max(scale, 1.0))


def test_inlined_body_has_no_function_and_gives_the_same() -> None:
    with_function, inlined = trace(_program(memory_node)), lower(trace(_program(memory_node)), "scan")
    assert with_function.functions
    assert not inlined.functions
    assert memory_op.DOMAIN not in inlined.opset_imports
    for tokens in (1, 13):
        feeds = {name: x.numpy() for name, x in _inputs(tokens, "lively").items()}
        results = [_session(memory_node, scan).run(None, feeds) for scan in ("plugin", "scan")]
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
