"""What stands in a graph for the memory: the choice behind ``--scan``."""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from titans_converters import memory_op
from titans_converters.onnx.quantize import CONTRIB

SCANS = ("plugin", "scan", "unrolled", "native")
"""``plugin``: one node of ours a layer, with a function as its body. ``scan``: that body in its place, ONNX
``Scan`` over tiles, and no function. ``unrolled``: neither; for given numbers of tokens, see
:mod:`titans_converters.onnx.unroll`. ``native``: ONNX Runtime's own operator."""

NATIVE_ONNXRUNTIME = "1.32"  # the only one in which ``native`` was tried

_LEAST_LOG_RETENTION = -13.8155  # log 1e-6
_LEAST_STRENGTH = 1e-12


def linear_attention_node(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    edit: Tensor,
    past_memory: Tensor,
    past_momentum: Tensor,
    *,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule without momentum as ``com.microsoft::LinearAttention``, for every ``λ``.

    That operator, of the kind ``gated_delta``, computes ``M_t = a M_{t-1} + β k (v' - a M_{t-1}ᵀ k)ᵀ``. With
    ``β = λ θ / a`` and ``v' = a v / λ`` this is ``a M_{t-1} + θ k (v - λ M_{t-1}ᵀ k)ᵀ``, the rule. The floors
    under ``a`` and ``λ``, which are divisors, change a result by a millionth of the memory at most.
    """
    del log_momentum, tile  # no momentum; the operator chooses its own tiles
    heads = query.shape[1]
    log_retention = log_retention.clamp(min=_LEAST_LOG_RETENTION)
    retention = log_retention.exp()
    strength = edit.clamp(min=_LEAST_STRENGTH)[:, None, None]
    rate = strength * step / retention
    value = (retention / strength)[..., None] * value
    output, memory = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::LinearAttention",
        (
            *(_tokens_first(x).flatten(2) for x in (query, key, value)),
            past_memory,
            *(_tokens_first(x) for x in (log_retention, rate)),
        ),
        {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0, "update_rule": "gated_delta"},
        dtypes=(query.dtype, past_memory.dtype),
        shapes=((query.shape[0], query.shape[2], heads * past_memory.shape[-1]), past_memory.shape),
        version=1,
    )
    return _tokens_first(output.unflatten(2, (heads, -1))), memory, past_momentum


def _tokens_first(x: Tensor) -> Tensor:
    """``(B, H, T, …) ↔ (B, T, H, …)``."""
    return x.transpose(1, 2)


def lower(model: ir.Model, scan: str) -> ir.Model:
    """A traced model in the form ``scan``: its functions' bodies where they are called, or as it is.

    ``unrolled`` is no form for any number of tokens, which is what this one is.
    """
    if scan != "scan":
        return model
    inlined = InlinePass()(model).model
    inlined.opset_imports.pop(memory_op.DOMAIN, None)
    return inlined
