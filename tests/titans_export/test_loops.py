"""What a tile leaves behind, for all tiles at once: against one tile after the other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_export.loops import carried_on
from titans_export.recurrence import align, into_tiles


@given(st.integers(1, 19), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
def test_places_without_a_token_keep_what_was_there(tokens: int, positions: list[int], parts: int) -> None:
    tile, rows = 4, len(positions)
    cut = align(torch.tensor(positions), tokens, tile)
    values = torch.arange(1.0, 1 + rows * tokens).reshape(rows, 1, tokens, 1)
    new = _in_parts(into_tiles(values, cut)[:, :, 0, :, 0], parts)
    lives = _in_parts(cut.live, parts)
    start = -torch.arange(1.0, 1 + rows * tile // parts).reshape(rows, tile // parts)
    before, after, last = carried_on(new, lives, start, parts)
    now = start
    for n, live in enumerate(lives):
        there = live.any(1)  # what an empty part is given does not matter
        assert torch.equal(before[n][there], now[there])
        now = torch.where(live, new[n], now)
        complete = live[:, -1] | (n == 0)  # with its last token all of a part is there, or was
        assert torch.equal(after[n][complete], now[complete])
        assert torch.equal(after[n][live], now[live])
    assert torch.equal(last, now)


def _in_parts(tiles: torch.Tensor, parts: int) -> torch.Tensor:
    """``(N, B, C)`` → ``(N parts, B, C / parts)``."""
    return tiles.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
