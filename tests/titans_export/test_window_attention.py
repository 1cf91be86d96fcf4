"""Window attention equals attention over plain lists of past tokens, at their true positions."""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from titans_export import attention
from titans_export.attention import rotate, window_attention

BATCH, HEADS, DIM, PERSISTENT = 2, 2, 4, 3


def _dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def _turned(x: list[float], position: int) -> list[float]:
    """Rotary position by complex numbers: component ``i`` and ``i + D/2`` are one of them."""
    half = len(x) // 2
    numbers = [
        complex(x[i], x[i + half]) * cmath.exp(1j * position * 10_000.0 ** (-i / half)) for i in range(half)
    ]
    return [z.real for z in numbers] + [z.imag for z in numbers]


def _reference(
    query: Tensor, key: Tensor, value: Tensor, window: int, persistent_key: Tensor, persistent_value: Tensor
) -> Tensor:
    """``(H, T, D)`` of one row, from the first token of its stream on."""
    output = torch.empty_like(query)
    for head in range(query.shape[0]):
        for t in range(query.shape[1]):
            seen = range(max(0, t - window + 1), t + 1)
            q = query[head, t].tolist()
            turned = _turned(q, t)
            scores = [_dot(q, k) for k in persistent_key[head].tolist()]
            scores += [_dot(turned, _turned(key[head, s].tolist(), s)) for s in seen]
            weights = torch.softmax(torch.tensor(scores, dtype=torch.float64) / math.sqrt(DIM), 0)
            values = torch.cat([persistent_value[head], value[head, list(seen)]])
            output[head, t] = weights @ values
    return output


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", [3, 512])
@given(window=st.integers(2, 9), seed=st.integers(0, 1000), data=st.data())
def test_equals_lists_of_tokens_however_it_is_cut(
    block: int, window: int, seed: int, data: st.DataObject
) -> None:
    """Rows stand at different positions: the second one has seen some tokens before the first begins."""
    lead, tokens = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 24))
    streams = _normal(seed, 3, HEADS, lead + tokens, DIM), _normal(seed + 1, 3, HEADS, tokens, DIM)
    persistent = _normal(seed + 2, 2, HEADS, PERSISTENT, DIM)
    states = [torch.zeros(2, HEADS, window - 1, DIM, dtype=torch.float64) for _ in range(2)]
    if lead:
        first = [x[None, :, :lead] for x in streams[0]]
        past = states[0][:, None]
        _, *after = window_attention(*first, *past, torch.tensor([0]), *persistent)
        states[0] = torch.cat(after)
    position = torch.tensor([lead, 0])
    key_value = [torch.stack([states[0][i], states[1][i]]) for i in range(2)]
    inputs = [torch.stack([streams[0][i][:, lead:], streams[1][i]]) for i in range(3)]
    places = sorted(data.draw(st.sets(st.integers(0, tokens), max_size=4)) | {0, tokens})
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        for start, end in itertools.pairwise(places):
            part = [x[:, :, start:end] for x in inputs]
            y, *key_value = window_attention(*part, *key_value, position + start, *persistent)
            outputs.append(y)
    actual = torch.cat(outputs, dim=2)
    for row, (stream, skipped) in enumerate(zip(streams, (lead, 0), strict=True)):
        expected = _reference(*stream, window, *persistent)[:, skipped:]
        assert torch.allclose(actual[row], expected, rtol=1e-12, atol=1e-12)


def test_angles_do_not_grow_with_the_stream() -> None:
    """A million tokens on, the same tokens give the same output bit for bit, in float32 too."""
    query, key, value = _normal(0, 3, 1, HEADS, 9, DIM).float()
    past = _normal(1, 2, 1, HEADS, 5, DIM).float()
    persistent = _normal(2, 2, HEADS, PERSISTENT, DIM).float()
    early, late = (
        window_attention(query, key, value, *past, torch.tensor([position]), *persistent)[0]
        for position in (5, 10**6)
    )
    assert torch.equal(early, late)


@given(st.integers(0, 10**5), st.integers(0, 1000), st.integers(0, 1000))
def test_rotary_scores_depend_on_distance_alone(start: int, first: int, second: int) -> None:
    query, key = _normal(3, 2, 1, 1, 1, 8)
    near, far = (
        rotate(query, torch.tensor([offset + first])) @ rotate(key, torch.tensor([offset + second])).mT
        for offset in (0, start)
    )
    assert torch.allclose(near, far, atol=1e-9)


def test_bfloat16_keeps_positions_apart() -> None:
    """Angles are float32 at least: bfloat16 has no 513."""
    x = torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)
    turned = rotate(x, torch.tensor([512, 513]))
    assert turned.dtype == torch.bfloat16
    assert not torch.equal(turned[0, 0, 0], turned[0, 0, 1])
