"""Softmax attention over a window or a segment, with rotary positions and persistent tokens."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 512
"""Queries that attend at once: bounds the scores of a long call."""

_ROTARY_BASE = 10_000.0


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position (arXiv 2104.09864): pairs of halves turn by ``position`` times their frequency.

    Args:
        x: ``(B, H, T, D)``, ``D`` even.
        position: broadcastable to ``(B, 1, T)``; only differences between queries and keys matter.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot tell neighbouring positions apart
    frequency = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = position[..., None].to(dtype) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def attend(
    query: Tensor,
    turned_query: Tensor,
    persistent_key: Tensor,
    persistent_value: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
) -> Tensor:
    """``softmax(Q Kᵀ / √D) V`` over persistent tokens, always visible, and others.

    Args:
        query: ``(B, H, T, D)``, for the persistent tokens, which have no position.
        turned_query: the same, rotated.
        persistent_key: ``(H, P, D)``.
        persistent_value: ``(H, P, D)``.
        key: ``(B, H, S, D)``, rotated.
        value: ``(B, H, S, D)``.
        allowed: broadcastable to ``(B, H, T, S)`` bool, with one True in every row.
    """
    near = (turned_query @ key.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
    scores = torch.cat([query @ persistent_key.transpose(-1, -2), near], dim=-1)
    weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
    persistent = persistent_key.shape[-2]
    attended: Tensor = weights[..., :persistent] @ persistent_value + weights[..., persistent:] @ value
    return attended


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    position: Tensor,
    persistent_key: Tensor,
    persistent_value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention to the last ``W`` tokens, the current one included, and to persistent tokens.

    Keys are kept unrotated, and turned by their place in the window: angles stay small however long
    the stream is.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D)``.
        past_key: ``(B, H, W - 1, D)``, the tokens before.
        past_value: ``(B, H, W - 1, D)``.
        position: ``(B,)`` int64, tokens seen before: fewer than ``W - 1`` leave the first ones empty.
        persistent_key: ``(H, P, D)``, visible from everywhere and without position.
        persistent_value: ``(H, P, D)``.

    Returns:
        ``(B, H, T, D)``, present key and value.
    """
    past, tokens = past_key.shape[2], query.shape[2]
    keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    places = torch.arange(past + tokens, device=query.device)
    seen = places >= past - position[:, None]  # (B, S): whether there was a token at all
    if torch.compiler.is_exporting():  # a graph has no loop over queries
        blocks = [(0, tokens)]
    else:
        starts = range(0, tokens, QUERY_BLOCK)
        blocks = [(start, min(start + QUERY_BLOCK, tokens)) for start in starts]
    outputs = []
    for start, stop in blocks:
        own = places[past + start : past + stop]
        window = places[start : past + stop]
        distance = own[:, None] - window
        allowed = (distance >= 0) & (distance <= past) & seen[:, None, None, start : past + stop]
        outputs.append(
            attend(
                query[:, :, start:stop],
                rotate(query[:, :, start:stop], own),
                persistent_key,
                persistent_value,
                rotate(keys[:, :, start : past + stop], window),
                values[:, :, start : past + stop],
                allowed,
            )
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output, keys[:, :, tokens:], values[:, :, tokens:]
