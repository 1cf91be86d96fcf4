"""What a tile leaves behind, for all tiles at once: against one tile after the other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_export.loops import carried_on
from titans_export.recurrence import align, into_tiles


@given(st.integers(1, 19), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_places_without_a_token_keep_what_was_there(tokens: int, positions: list[int]) -> None:
    tile, rows = 4, len(positions)
    cut = align(torch.tensor(positions), tokens, tile)
    values = torch.arange(1.0, 1 + rows * tokens).reshape(rows, 1, tokens, 1)
    new = into_tiles(values, cut)[:, :, 0, :, 0]
    start = -torch.arange(1.0, 1 + rows * tile).reshape(rows, tile)
    before, after, last = carried_on(new, cut.live, start)
    now = start
    for n, live in enumerate(cut.live):
        there = live.any(1)  # what an empty tile is given does not matter
        assert torch.equal(before[n][there], now[there]) or n > 0
        complete = live.all(1) | (n == 0)
        now = torch.where(live, new[n], now)
        assert torch.equal(after[n][complete], now[complete])
        assert torch.equal(after[n][live], now[live])
    assert torch.equal(last, now)
