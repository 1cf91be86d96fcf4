"""The attention of ``MemoryAsContextTransformer``: within a segment, or over a sliding window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_export.importers.titans_pytorch.memory import Projection
from titans_export.importers.titans_pytorch.options import TransformerOptions
from titans_export.loops import carried_on
from titans_export.memory_layer import StateEntry, merge_heads, split_heads


class AttentionState(NamedTuple):
    """Keys, turned by their place, and values ``(B, h, places, D)``.

    Attributes:
        key: of the segment's tokens; long-term tokens are seen at once, where the next segment begins.
        value: likewise.
        past_key: of the segment before, long-term tokens included; None without a sliding window.
        past_value: likewise.
    """

    key: Tensor
    value: Tensor
    past_key: Tensor | None = None
    past_value: Tensor | None = None


class Places(NamedTuple):
    """Where tiles stand.

    Attributes:
        live: ``(N, B, S)`` bool, which of a segment's tokens are there.
        segment: ``(N, B)`` int64, the segment's number.
    """

    live: Tensor
    segment: Tensor


class SegmentAttention(nn.Module):
    """Softmax attention with rotary places and persistent tokens.

    A place is counted from the start of its segment, which changes no product of a query and a key:
    angles stay small however long the stream is. Persistent keys alone have no place of their own, and so
    a query is turned by its place in the whole stream for them.
    """

    def __init__(self, options: TransformerOptions, first: bool) -> None:
        """``first``: whether it is the first layer, whose values all others mix in."""
        super().__init__()
        dim, heads, width = options.dim, options.heads, options.dim_head
        self.options = options
        self.norm = nn.RMSNorm(dim)
        self.to_qkv = Projection(dim, 3 * heads * width)
        self.to_out = Projection(heads * width, dim)
        self.to_value_mix = None if first else Projection(dim, heads, bias=True)
        self.persistent = nn.Parameter(torch.zeros(2, heads, options.num_persist_mem_tokens, width))
        self.frequencies = nn.Parameter(torch.zeros(width // 2))

    def entries(self) -> dict[str, StateEntry]:
        """State, in the order of :class:`AttentionState`."""
        options = self.options
        shape = (options.heads, options.segment_len, options.dim_head)
        schema = {"key": StateEntry(shape), "value": StateEntry(shape)}
        if options.sliding_window_attn:
            past = StateEntry((options.heads, options.window, options.dim_head))
            schema |= {"past_key": past, "past_value": past}
        return schema

    def project(self, x: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value, ``(B, h, E, D)``, and the value before the first layer's is mixed in."""
        x = self.norm(x)
        query, key, own = split_heads(self.to_qkv(x), 3 * self.options.heads).chunk(3, dim=1)
        if self.to_value_mix is None or values is None:
            return query, key, own, own
        mix = torch.sigmoid(self.to_value_mix(x)).transpose(1, 2)[..., None]
        return query, key, own + mix * (values - own), own

    def tiles(
        self, x: Tensor, places: Places, state: AttentionState, values: Tensor | None
    ) -> tuple[Tensor, AttentionState, Tensor]:
        """Segments, each after the long-term tokens of the segment before, ``(N B, NL + S, dim)``.

        Returns:
            What is attended to, the state after the last, and the layer's own values.
        """
        window, size = self.options.window, self.options.segment_len
        lead, segment = window - size, places.segment.flatten()
        query, key, value, own = self.project(x, values)
        coordinates = torch.cat([torch.arange(size, window), torch.arange(size)]).to(x.device)
        everywhere = self._everywhere(query, torch.arange(-lead, size, device=x.device), segment)
        query, key = self._turn(query, coordinates), self._turn(key, coordinates)
        here = places.live[:, :, None, :, None]
        before_key, own_key, last_key = _carried(key[:, :, lead:], here, state.key)
        before_value, own_value, last_value = _carried(value[:, :, lead:], here, state.value)
        end = AttentionState(last_key, last_value)
        keys = torch.cat([before_key, key[:, :, :lead]], dim=2)
        kept = torch.cat([before_value, value[:, :, :lead]], dim=2)
        before, now = AttentionState(keys, kept), AttentionState(own_key, own_value)
        if state.past_key is not None and state.past_value is not None:
            begins = places.live[:, :, :1, None, None]
            turned = self._turn(keys, torch.full((1,), -window, device=x.device))
            past_keys = _carried(turned, begins, state.past_key)
            past_values = _carried(kept, begins, state.past_value)
            before, now, end = (
                one._replace(past_key=past_key, past_value=past_value)
                for one, past_key, past_value in zip((before, now, end), past_keys, past_values, strict=True)
            )
        outputs = []
        if lead:
            own_places = torch.arange(size, window, device=x.device)[None]
            past = self._past(before, own_places, segment - 1)
            asked = None if everywhere is None else everywhere[:, :, :lead]
            outputs.append(self._attend(query[:, :, :lead], keys, kept, own_places, past, asked))
        own_places = torch.arange(size, device=x.device)[None]
        past = self._past(now, own_places, segment)
        asked = None if everywhere is None else everywhere[:, :, lead:]
        outputs.append(self._attend(query[:, :, lead:], now.key, now.value, own_places, past, asked))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return self.to_out(merge_heads(y)), end, own

    def one(
        self, x: Tensor, place: Tensor, segment: Tensor, state: AttentionState, values: Tensor | None
    ) -> tuple[Tensor, AttentionState, Tensor]:
        """One token ``(B, 1, dim)`` that does not begin a segment, or has no long-term tokens before it."""
        query, key, value, own = self.project(x, values)
        at = place[:, None, None]
        everywhere = self._everywhere(query, place[:, None], segment)
        query, key = self._turn(query, at), self._turn(key, at)
        here = (torch.arange(self.options.segment_len, device=x.device) == place[:, None])[:, None, :, None]
        now = state._replace(
            key=torch.where(here, key, state.key), value=torch.where(here, value, state.value)
        )
        own_places = place[:, None]
        past = self._past(now, own_places, segment)
        y = self._attend(query, now.key, now.value, own_places, past, everywhere)
        return self.to_out(merge_heads(y)), now, own

    def _past(
        self, state: AttentionState, own: Tensor, segment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values of the segment before, and which ``(B, 1, T, W)`` are within the window."""
        if state.past_key is None or state.past_value is None:
            return None
        places = torch.arange(self.options.window, device=own.device)
        seen = (places >= own[..., None]) & (segment > 0)[:, None, None]
        return state.past_key, state.past_value, seen[:, None]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own: Tensor,
        past: tuple[Tensor, Tensor, Tensor] | None,
        everywhere: Tensor | None,
    ) -> Tensor:
        """``(B, h, T, D)``; queries at places ``own`` see keys at places up to theirs.

        ``everywhere``: the queries as persistent keys see them.
        """
        seen = (torch.arange(key.shape[2], device=own.device) <= own[..., None])[:, None]
        scores = _masked(query @ key.mT, seen)
        parts, sources = [scores], [value]
        if past is not None:
            past_key, past_value, within = past
            parts.append(_masked(query @ past_key.mT, within))
            sources.append(past_value)
        if everywhere is not None:
            parts.append(everywhere @ self.persistent[0].mT)
            sources.append(self.persistent[1])
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        weights = (scores * self.options.dim_head**-0.5).softmax(-1)
        widths = [part.shape[-1] for part in parts]
        y: Tensor = sum(
            (w @ v for w, v in zip(weights.split(widths, dim=-1), sources, strict=True)),
            start=torch.zeros((), dtype=query.dtype, device=query.device),
        )
        return y

    def _everywhere(self, query: Tensor, place: Tensor, segment: Tensor) -> Tensor | None:
        """Queries turned by their place in the stream, of which ``place`` is that in the segment."""
        if not self.options.num_persist_mem_tokens:
            return None
        return self._turn(query, (segment[:, None] * self.options.window + place)[:, None])

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        """Rotary places (arXiv 2104.09864), pairs of halves: the import has put them so."""
        left, right = x.chunk(2, dim=-1)
        angle = place[..., None].to(x.dtype) * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _carried(new: Tensor, there: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`titans_export.loops.carried_on`, for tiles that stand along the batch."""
    in_tiles = new.reshape(*there.shape[:2], *new.shape[1:])
    before, after, last = carried_on(in_tiles, there, start)
    return before.flatten(0, 1), after.flatten(0, 1), last


def _masked(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, scores, float("-inf"))
