"""Recurrences that advance tile by tile, with the rows of a batch at any position of their streams.

A core says what happens within a tile; this module cuts streams into tiles. A row that stands in the
middle of a tile is moved right until its tile's first token stands in the first place; the empty
places before and after it are marked, and a core leaves its state alone there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from titans_export.loops import Loop, run_loop

Tensors = tuple[Tensor, ...]


class AnyCore(Protocol):
    """One kind of recurrence, with nothing in it but sizes.

    Attributes:
        name: of the operator that stands for it in an exported graph.
        tile: tokens of a tile; tiles begin at multiples of it.
        apart: places in a tile whose token ``one`` does not take, since more happens there than one token:
            ``step`` takes it, in a tile of its own. Often none.
    """

    @property
    def name(self) -> str:
        """Of the operator."""
        ...

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        ...

    @property
    def apart(self) -> tuple[int, ...]:
        """Places whose token ``one`` does not take."""
        ...

    def one(self, tokens: Tensors, place: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """One token.

        Args:
            tokens: ``(B, H, 1, …)`` each.
            place: ``(B,)`` int64, the token's place in its tile.
            carry: the state.
            shared: what does not change from token to token: edit strength, weights.

        Returns:
            ``(B, H, 1, Dv)`` and the state after the token.
        """
        ...


class TileCore(AnyCore, Protocol):
    """A recurrence of one tile after the other."""

    def step(self, tokens: Tensors, live: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """One tile: ``(B, H, C, …)`` each, of which ``live (B, C)`` says which tokens are there."""
        ...


@runtime_checkable
class TogetherCore(AnyCore, Protocol):
    """A recurrence that takes all tiles at once, but for loops within it."""

    def together(
        self, tokens: Tensors, live: Tensor, carry: Tensors, shared: Tensors, loop: Loop
    ) -> tuple[Tensor, Tensors]:
        """All tiles: ``(N, B, H, C, …)`` each, of which ``live (N, B, C)`` says which tokens are there.

        Of a row, all tiles are whole but the first and the last one that has a token; none but the last of
        all has none.
        """
        ...


Core = TileCore | TogetherCore


Recurrence = Callable[[Core, Tensor, Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]
"""Anything with the contract of :func:`run_core`."""


def run_core(
    core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
) -> tuple[Tensor, Tensors]:
    """Advance by ``T`` tokens.

    Args:
        core: what happens.
        position: ``(B,)`` int64, tokens that each row has seen before.
        tokens: ``(B, H, T, …)`` each.
        carry: the state.
        shared: see :meth:`Core.one`.

    Returns:
        ``(B, H, T, Dv)`` and the state after the last token.
    """
    if tokens[0].shape[2] == 1 and not _is_apart(core, position):
        return core.one(tokens, position % core.tile, carry, shared)
    cut = align(position, tokens[0].shape[2], core.tile)
    tiles = [into_tiles(x, cut) for x in tokens]
    if isinstance(core, TogetherCore):
        together, carry = core.together(tuple(tiles), cut.live, carry, shared, run_loop)
        return from_tiles(together, cut), carry
    outputs = []
    # Taken apart once: the gradient of a slice is as large as what it was cut from.
    for live, *tile in zip(*(x.unbind(0) for x in (cut.live, *tiles)), strict=True):
        y, carry = core.step(tuple(tile), live, carry, shared)
        outputs.append(y)
    return from_tiles(torch.stack(outputs), cut), carry


def _is_apart(core: Core, position: Tensor) -> bool:
    """Whether any row's token stands at a place that ``one`` does not take."""
    if not core.apart:
        return False
    apart = torch.tensor(core.apart, device=position.device)
    return bool((position[:, None] % core.tile == apart).any())


class Alignment(NamedTuple):
    """Which token stands where.

    Attributes:
        token: ``(N, B, C)`` int64, index of the token at each place; some token where there is none.
        live: ``(N, B, C)`` bool, whether there is one.
        place: ``(B, T)`` int64, where each token stands, counted over all tiles.
    """

    token: Tensor
    live: Tensor
    place: Tensor


def align(position: Tensor, tokens: int, tile: int) -> Alignment:
    """Cut ``tokens`` tokens of every row where the row's tiles begin."""
    offset = position % tile
    count = _tile_count(offset, tokens, tile)
    places = torch.arange(count * tile, device=position.device)
    token = places - offset[:, None]  # (B, N C)
    live = (token >= 0) & (token < tokens)
    token = torch.where(live, token, 0)
    place = offset[:, None] + torch.arange(tokens, device=position.device)
    shape = (position.shape[0], count, tile)
    return Alignment(token.reshape(shape).transpose(0, 1), live.reshape(shape).transpose(0, 1), place)


def _tile_count(offset: Tensor, tokens: int, tile: int) -> int:
    if torch.compiler.is_compiling():  # a graph cannot know the offsets: enough for any
        return (tokens + 2 * tile - 2) // tile
    return int((int(offset.max()) + tokens + tile - 1) // tile)


def into_tiles(x: Tensor, cut: Alignment) -> Tensor:
    """``(B, H, T, …) → (N, B, H, C, …)``, whole rows at a time."""
    batch, heads, tokens = x.shape[:3]
    first = torch.arange(batch * heads, device=x.device).reshape(batch, heads, 1) * tokens
    rows = x.reshape(batch * heads * tokens, *x.shape[3:])
    return rows[first + cut.token[:, :, None]]


def from_tiles(tiles: Tensor, cut: Alignment) -> Tensor:
    """``(N, B, H, C, D) → (B, H, T, D)``."""
    _, batch, heads, tile, dim = tiles.shape
    stream = torch.arange(batch * heads, device=tiles.device).reshape(batch, heads, 1)
    n, place = cut.place // tile, cut.place % tile  # (B, T)
    row = (n[:, None] * (batch * heads) + stream) * tile + place[:, None]
    return tiles.reshape(-1, dim)[row]
