"""The body of ``titans::NeuralMemory`` as a model-local ONNX function.

Stock ONNX Runtime inlines the function; TensorRT replaces the node by a plugin of the same name.
``docs/mathematics.md`` derives both branches. Names below are its symbols; ``N`` tiles of ``C``
tokens, and ``p'`` is written ``p_before``. A line that ends in ``# momentum`` is there for memories that
have some, one that ends in ``# no momentum`` for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx
import onnx.parser

from titans_converters.memory_op import ATTRIBUTES, DOMAIN, INPUTS, LOG_FLOOR, NAME, OUTPUTS

OPSET = 23
"""Of every graph, and of the body: the checker wants both to be the same."""

GENERAL = ("tiles", "edited")
"""Names of the branches that hold for any number of tokens and any strength."""

INVERSE, INVERTED = "inverse", "n"
"""The values ``(I + N)⁻¹`` and ``N``."""

TILED: Final = {"q": "rows_k", "k": "rows_k", "v": "rows_v"}
"""What a gather lays out in tiles, and the shape of the rows that it takes."""

PLACES: Final = "y_index"
"""Where in the tiles each token is: leads back from them."""

_COLUMN, _SQUARE = ("N", None, None, "C", 1), ("N", None, None, "C", "C")
_TOKENS = ("N", None, None, "C", None)
SIZES: Final[Mapping[str, tuple[int | str | None, ...]]] = (
    dict.fromkeys(("q", "k", "v"), _TOKENS)
    | dict.fromkeys(("la", "le", "theta", "p", "r", "r_before"), _COLUMN)
    | dict.fromkeys(("big_a", "w", "w_before"), _SQUARE)
    | dict.fromkeys(("reachable", "counted"), ("C", "C + 1"))
    | dict.fromkeys(("running_sum", "inverse_1", *(f"mask_{2**i}" for i in range(16))), ("C", "C"))
    | dict.fromkeys(("end_p", "end_r", "end_c"), ("N", None, None, 1, 1))
    | dict.fromkeys(("end_w", "end_e"), ("N", None, None, 1, "C"))
    | {"end_one_hot": ("N", 1, 1, 1, "C")}
    | {
        "last_column": ("B", "H", None, 1),
        "last_u": ("B", "H", 1, None),
        "last_write": ("B", "H", None, None),
    }
)
"""Sizes that shape inference does not find, since ``N`` tiles of ``C`` follow from the number of tokens."""

ALIKE: Final = {"y_u": "read_q", "m_u": "m", "s_u": "s"}
"""Parts of a split, and what they are added to: their sizes are the same."""

_ONE_TOKEN = """
    a_bht = Exp(log_retention)
    eta_bht = Exp(log_momentum)  # momentum
    one_axis = Constant<value_ints = [-1]>()
    a = Unsqueeze(a_bht, one_axis)
    eta = Unsqueeze(eta_bht, one_axis)  # momentum
    one_theta = Unsqueeze(step, one_axis)
    edit_axes = Constant<value_ints = [1, 2, 3]>()
    strength = Unsqueeze(edit, edit_axes)
    seen = MatMul(key, past_memory)
    edited = Mul(strength, seen)
    error = Sub(value, edited)
    scaled_key = Mul(one_theta, key)
    key_column = Transpose<perm = [0, 1, 3, 2]>(scaled_key)
    write = Mul(key_column, error)  # momentum
    one_momentum = Mul(key_column, error)  # no momentum
    decayed = Mul(eta, past_momentum)  # momentum
    one_momentum = Add(decayed, write)  # momentum
    retained = Mul(a, past_memory)
    one_memory = Add(retained, one_momentum)
    one_output = MatMul(query, one_memory)
"""

_TILES = """
    # --- N tiles of C tokens, tiles first: (N, B, H, C, D). One gather moves whole rows to their
    #     tile; rows after the last token repeat it, and their step of 0 keeps them out of the memory.
    #     As few tiles as hold all tokens, and those no longer than they must be: C ≤ {tile}.
    most = Constant<value_ints = [{tile}]>()
    bh = Shape<start = 0, end = 2>(key)
    tokens_1 = Shape<start = 2, end = 3>(key)
    dk = Shape<start = 3>(key)
    dv = Shape<start = 3>(value)
    last_tokens = Sub(tokens_1, i1)
    above = Add(last_tokens, most)
    tiles = Div(above, most)
    above_c = Add(last_tokens, tiles)
    c = Div(above_c, tiles)
    c_1 = Add(c, i1)
    square = Concat<axis = 0>(c, c)
    oblong = Concat<axis = 0>(c, c_1)
    first_and_rest = Concat<axis = 0>(i1, c)
    corner = Constant<value_ints = [0, 0]>()
    padded = Mul(tiles, c)
    missing = Sub(padded, tokens_1)
    zero = Squeeze(i0)
    one = Squeeze(i1)
    tile_range_end = Squeeze(tiles)
    tile_index = Range(zero, tile_range_end, one)
    most_rows = Constant<value_ints = [{indices}]>()
    rows = Slice(most_rows, i0, c)
    after_n = Constant<value_ints = [1, 2, 3]>()
    tile_n = Unsqueeze(tile_index, after_n)
    tile_start = Mul(tile_n, c)
    tile_tokens = Add(tile_start, rows)
    known_tokens = Min(tile_tokens, last_tokens)
    streams = ReduceProd<keepdims = 0>(bh)
    stream_range = Range(zero, streams, one)
    one_per_stream = Concat<axis = 0>(i1, bh, i1)
    stream_index = Reshape(stream_range, one_per_stream)
    stream_start = Mul(stream_index, tokens_1)
    row_index = Add(stream_start, known_tokens)
    rows_k = Concat<axis = 0>(minus_one, dk)
    rows_v = Concat<axis = 0>(minus_one, dv)
    q_rows = Reshape(query, rows_k)
    k_rows = Reshape(key, rows_k)
    v_rows = Reshape(value, rows_v)
    q = Gather<axis = 0>(q_rows, row_index)
    k = Gather<axis = 0>(k_rows, row_index)
    v = Gather<axis = 0>(v_rows, row_index)
    pads3 = Concat<axis = 0>(i0, i0, i0, i0, i0, missing)
    shape_g = Concat<axis = 0>(bh, tiles, c, i1)
    floor = Constant<value_float = {floor}>()
    la_floored = Clip(log_retention, floor)
    le_floored = Clip(log_momentum, floor)  # momentum
    la_padded = Pad(la_floored, pads3)
    le_padded = Pad(le_floored, pads3)  # momentum
    theta_padded = Pad(step, pads3)
    la_tiles = Reshape(la_padded, shape_g)
    le_tiles = Reshape(le_padded, shape_g)  # momentum
    theta_tiles = Reshape(theta_padded, shape_g)
    la = Transpose<perm = [2, 0, 1, 3, 4]>(la_tiles)
    le = Transpose<perm = [2, 0, 1, 3, 4]>(le_tiles)  # momentum
    theta = Transpose<perm = [2, 0, 1, 3, 4]>(theta_tiles)
    edit_axes = Constant<value_ints = [1, 2, 3]>()
    strength = Unsqueeze(edit, edit_axes)

    # --- segment sums as products with masks. Column 0 stands for the state before the tile,
    #     column s + 1 for write s: G[t, s+1] = prod of gates s+1..t, G[t, 0] = prod of gates 0..t.
    columns = Constant<value_ints = [{columns}]>()
    row = Unsqueeze(most_rows, i1)
    column = Unsqueeze(columns, i0)
    f0 = Constant<value_float = 0.0>()
    f1 = Constant<value_float = 1.0>()
    minus_infinity = Constant<value_float = -inf>()
    after = Sub(column, i1)
    at_or_before = GreaterOrEqual(row, after)
    most_reachable = Where(at_or_before, f0, minus_infinity)
    reachable = Slice(most_reachable, corner, oblong)
    row_t = Unsqueeze(most_rows, i0)
    sums_to = GreaterOrEqual(row, row_t)
    most_running_sum = Where(sums_to, f1, f0)
    running_sum = Slice(most_running_sum, corner, square)
    is_after = Greater(row, after)
    most_counted = Where(is_after, f1, f0)
    counted = Slice(most_counted, corner, oblong)
    la_spread = Mul(la, counted)
    le_spread = Mul(le, counted)  # momentum
    la_sums = MatMul(running_sum, la_spread)
    le_sums = MatMul(running_sum, le_spread)  # momentum
    la_masked = Add(la_sums, reachable)
    le_masked = Add(le_sums, reachable)  # momentum
    p_and_a = Exp(la_masked)
    c_and_e = Exp(le_masked)  # momentum
    p, big_a = Split<axis = 4>(p_and_a, first_and_rest)  # momentum
    r_and_w = MatMul(big_a, c_and_e)  # momentum
    r, w = Split<axis = 4>(r_and_w, first_and_rest)  # momentum
    p, w = Split<axis = 4>(p_and_a, first_and_rest)  # no momentum

    # --- moves a column one row down: the same weights for M_(t-1)
    pad_row = Constant<value_ints = [0, 0, 0, 1, 0, 0, 0, 0, -1, 0]>()

    # --- products of keys and queries
    k_t = Transpose<perm = [0, 1, 2, 4, 3]>(k)
    qk = MatMul(q, k_t)
    attention = Mul(w, qk)
    theta_v = Mul(theta, v)
    q_for_m = Mul(p, q)  # momentum
    q_for_s = Mul(r, q)  # momentum
    asked = Concat<axis = 4>(q_for_m, q_for_s)  # momentum
    asked = Mul(p, q)  # no momentum

    # --- weights of the state's step, at the row of each tile's last token
    last_in_tile = Mod(last_tokens, c)
    full_row = Sub(c, i1)
    last_tile = Sub(tiles, i1)
    is_last_tile = Equal(tile_index, last_tile)
    end_row = Where(is_last_tile, last_in_tile, full_row)
    end_axes = Constant<value_ints = [1, 2, 3, 4]>()
    end_row_5 = Unsqueeze(end_row, end_axes)
    is_end_row = Equal(end_row_5, rows)
    end_one_hot = Where(is_end_row, f1, f0)
    end_p = MatMul(end_one_hot, p)  # momentum
    end_r_and_w = MatMul(end_one_hot, r_and_w)  # momentum
    end_c_and_e = MatMul(end_one_hot, c_and_e)  # momentum
    end_r, end_w = Split<axis = 4>(end_r_and_w, first_and_rest)  # momentum
    end_c, end_e = Split<axis = 4>(end_c_and_e, first_and_rest)  # momentum
    end_p_and_w = MatMul(end_one_hot, p_and_a)  # no momentum
    end_p, end_w = Split<axis = 4>(end_p_and_w, first_and_rest)  # no momentum
    k_to_m = Mul(k_t, end_w)
    k_to_s = Mul(k_t, end_e)  # momentum
    attention_and_writes = Concat<axis = 3>(attention, k_to_m, k_to_s)  # momentum
    row_splits = Concat<axis = 0>(c, dk, dk)  # momentum
    attention_and_writes = Concat<axis = 3>(attention, k_to_m)  # no momentum
    row_splits = Concat<axis = 0>(c, dk)  # no momentum

    # --- without editing (λ = 0 in every row) the memory does not read itself: N = 0 and U = θ V
    strongest = ReduceMax<keepdims = 0>(edit)
    editing = Greater(strongest, f0)
    tile_memory, tile_momentum, y = If (editing) <  # momentum
    tile_memory, written, y = If (editing) <  # no momentum
        then_branch = edited () => (float[b, h, d, v] edited_memory,
                                    float[b, h, d, v] edited_momentum,  # momentum
                                    float[n, b, h, t, v] edited_u,  # no momentum
                                    float[n, b, h, t, v] edited_y) {{{edited}}},
        else_branch = plain () => (float[b, h, d, v] plain_memory,
                                   float[b, h, d, v] plain_momentum,  # momentum
                                   float[n, b, h, t, v] plain_u,  # no momentum
                                   float[n, b, h, t, v] plain_y) {{{plain}}}
    >
    # --- back to (B, H, T, Dv): token t of stream x is row t mod C of tile t div C
    tokens_s = Squeeze(tokens_1)
    token_index = Range(zero, tokens_s, one)
    tile_of = Div(token_index, c)
    place_in_tile = Mod(token_index, c)
    streams_1 = ReduceProd<keepdims = 1>(bh)
    tile_offset = Mul(tile_of, streams_1)
    stream_axis = Concat<axis = 0>(bh, i1)
    stream_of = Reshape(stream_range, stream_axis)
    tile_and_stream = Add(tile_offset, stream_of)
    tile_row = Mul(tile_and_stream, c)
    y_index = Add(tile_row, place_in_tile)
    y_rows = Reshape(y, rows_v)
    tile_output = Gather<axis = 0>(y_rows, y_index)

    # --- without momentum S is the last write: k uᵀ
    axis_t = Constant<value_ints = [2]>()  # no momentum
    last_index = Slice(y_index, last_tokens, tokens_1, axis_t)  # no momentum
    written_rows = Reshape(written, rows_v)  # no momentum
    last_u = Gather<axis = 0>(written_rows, last_index)  # no momentum
    last_k = Slice(key, last_tokens, tokens_1, axis_t)  # no momentum
    last_column = Transpose<perm = [0, 1, 3, 2]>(last_k)  # no momentum
    last_write = MatMul(last_column, last_u)  # no momentum
    # under a name of its own, since SIZES holds for both kinds of memory
    tile_momentum = Identity(last_write)  # no momentum
"""

_EDITED = """
    # --- N, and its inverse by doubling blocks
    p_before = Pad(p, pad_row, f1)
    rw_before = Pad(r_and_w, pad_row)  # momentum
    r_before, w_before = Split<axis = 4>(rw_before, first_and_rest)  # momentum
    w_before = Pad(w, pad_row)  # no momentum
    kk = MatMul(k, k_t)
    rate = Mul(strength, theta)
    kk_weighted = Mul(w_before, kk)
    n = Mul(rate, kk_weighted)
{inverse}
    # --- what does not need the memory: U = own - seen [M; S], Y = asked [M; S] + attention U.
    #     A row of K scaled before the product is a column of the inverse scaled: half the work.
    rate_p = Mul(rate, p_before)
    rate_r = Mul(rate, r_before)  # momentum
    rate_p_row = Transpose<perm = [0, 1, 2, 4, 3]>(rate_p)
    rate_r_row = Transpose<perm = [0, 1, 2, 4, 3]>(rate_r)  # momentum
    inverse_p = Mul(inverse, rate_p_row)
    inverse_r = Mul(inverse, rate_r_row)  # momentum
    seen_m = MatMul(inverse_p, k)  # momentum
    seen_s = MatMul(inverse_r, k)  # momentum
    seen = Concat<axis = 4>(seen_m, seen_s)  # momentum
    seen = MatMul(inverse_p, k)  # no momentum
    own = MatMul(inverse, theta_v)
    edited_memory, edited_momentum, edited_y = Scan<  # momentum
        num_scan_inputs = 7,  # momentum
    edited_memory, edited_y, edited_u = Scan<  # no momentum
        num_scan_inputs = 5,  # no momentum
        body = edited_tile (float[b, h, x, v] m,
                            float[b, h, x, v] s,  # momentum
                            float[b, h, t, d2] e, float[b, h, t, d2] a,
                            float[b, h, z, t] aw, float[b, h, t, v] o,
                            float[b, h, 1, 1] er, float[b, h, 1, 1] ec,  # momentum
                            float[b, h, 1, 1] ep)
          => (float[b, h, x, v] m_next,
              float[b, h, x, v] s_next,  # momentum
              float[b, h, t, v] y_tile
              , float[b, h, t, v] u  # no momentum
             ) {{
            state = Concat<axis = 2>(m, s)  # momentum
            read_k = MatMul(e, state)  # momentum
            read_q = MatMul(a, state)  # momentum
            read_k = MatMul(e, m)  # no momentum
            read_q = MatMul(a, m)  # no momentum
            u = Sub(o, read_k)
{step}
        }}
    >(past_memory, past_momentum, seen, asked, attention_and_writes, own, end_r, end_c, end_p)  # momentum
    >(past_memory, seen, asked, attention_and_writes, own, end_p)  # no momentum
"""

_PLAIN = """
    plain_memory, plain_momentum, plain_y = Scan<  # momentum
        num_scan_inputs = 6,  # momentum
    plain_u = Identity(theta_v)  # no momentum
    plain_memory, plain_y = Scan<  # no momentum
        num_scan_inputs = 4,  # no momentum
        body = plain_tile (float[b, h, x, v] m,
                           float[b, h, x, v] s,  # momentum
                           float[b, h, t, d2] a, float[b, h, z, t] aw, float[b, h, t, v] u,
                           float[b, h, 1, 1] er, float[b, h, 1, 1] ec,  # momentum
                           float[b, h, 1, 1] ep)
          => (float[b, h, x, v] m_next,
              float[b, h, x, v] s_next,  # momentum
              float[b, h, t, v] y_tile) {{
            state = Concat<axis = 2>(m, s)  # momentum
            read_q = MatMul(a, state)  # momentum
            read_q = MatMul(a, m)  # no momentum
{step}
        }}
    >(past_memory, past_momentum, asked, attention_and_writes, theta_v, end_r, end_c, end_p)  # momentum
    >(past_memory, asked, attention_and_writes, theta_v, end_p)  # no momentum
"""

_TILE_STEP = """
            products = MatMul(aw, u)
            y_u, m_u, s_u = Split<axis = 2>(products, row_splits)  # momentum
            y_u, m_u = Split<axis = 2>(products, row_splits)  # no momentum
            y_tile = Add(read_q, y_u)
            m_kept = Mul(ep, m)
            s_into_m = Mul(er, s)  # momentum
            m_moved = Add(m_kept, s_into_m)  # momentum
            m_next = Add(m_moved, m_u)  # momentum
            m_next = Add(m_kept, m_u)  # no momentum
            s_kept = Mul(ec, s)  # momentum
            s_next = Add(s_kept, s_u)  # momentum
"""

_INDEX_CONSTANTS = """
    minus_one = Constant<value_ints = [-1]>()
    i0 = Constant<value_ints = [0]>()
    i1 = Constant<value_ints = [1]>()
"""

_FUNCTION = """
<domain: "{domain}", opset_import: ["": {opset}]>
{name} <{attributes}> ({inputs}) => ({outputs}) {{
    unit = Constant<value_ints = [1]>()
    tokens = Shape<start = 2, end = 3>(query)
    is_single = Equal(tokens, unit)
    {outputs} = If (is_single) <
        then_branch = one_token () => (float[b, h, t, v] one_output, float[b, h, d, v] one_memory,
                                       float[b, h, d, v] one_momentum) {{{one_token}}},
        else_branch = tiles () => (float[b, h, t, v] tile_output, float[b, h, d, v] tile_memory,
                                   float[b, h, d, v] tile_momentum) {{{tiles}}}
    >
}}
"""


def neural_memory_function(tile: int, momentum: bool = True) -> onnx.FunctionProto:
    """The operator's body for tiles of ``tile`` tokens; one token takes a path of its own.

    Any ``B``, ``H``, ``T ≥ 1``, ``Dk``, ``Dv`` and any ``λ`` per row. The attribute ``tile`` is
    declared for readers of the graph; this body is built for its value.

    Args:
        tile: tokens of a tile.
        momentum: False for nodes whose ``log_momentum`` is ``-inf`` throughout: with the same inputs and
            outputs, and without what momentum takes, a sixth of a small model's time.
    """
    tiles = _TILES.format(
        edited=_EDITED.format(inverse=_inverse_by_doubling(tile), step=_TILE_STEP),
        plain=_PLAIN.format(step=_TILE_STEP),
        tile=tile,
        floor=LOG_FLOOR,
        indices=", ".join(str(i) for i in range(tile)),
        columns=", ".join(str(i) for i in range(tile + 1)),
    )
    text = _FUNCTION.format(
        domain=DOMAIN,
        opset=OPSET,
        name=NAME,
        attributes=", ".join(ATTRIBUTES),
        inputs=", ".join(INPUTS),
        outputs=", ".join(OUTPUTS),
        one_token=_ONE_TOKEN,
        tiles=_INDEX_CONSTANTS + tiles,
    )
    return onnx.parser.parse_function(_lines_for(text, momentum))


def _inverse_by_doubling(tile: int) -> str:
    """``X ← X - X (N ∘ mask_s) X`` for ``s = 1, 2, 4, … < C``; with ``X = I`` the first needs no product."""
    lines = [
        "i_identity = Equal(row, row_t)",
        "most_identity = Where(i_identity, f1, f0)",
        "inverse_1 = Slice(most_identity, corner, square)",
    ]
    size, name = 1, "inverse_1"
    while size < tile:
        s, following = f"_{size}", f"inverse_{2 * size}"
        lines += [
            f"half{s} = Constant<value_ints = [{size}]>()",
            f"block{s} = Constant<value_ints = [{2 * size}]>()",
            f"row_block{s} = Div(row, block{s})",
            f"column_block{s} = Div(row_t, block{s})",
            f"same_block{s} = Equal(row_block{s}, column_block{s})",
            f"row_half{s} = Div(row, half{s})",
            f"column_half{s} = Div(row_t, half{s})",
            f"row_below{s} = Greater(row_half{s}, column_half{s})",
            f"in_mask{s} = And(same_block{s}, row_below{s})",
            f"most_mask{s} = Where(in_mask{s}, f1, f0)",
            f"mask{s} = Slice(most_mask{s}, corner, square)",
            f"below{s} = Mul(n, mask{s})",
        ]
        if size == 1:
            lines.append(f"{following} = Sub({name}, below{s})")
        else:
            lines += [
                f"left{s} = MatMul({name}, below{s})",
                f"change{s} = MatMul(left{s}, {name})",
                f"{following} = Sub({name}, change{s})",
            ]
        size, name = 2 * size, following
    lines.append(f"inverse = Identity({name})")
    return "".join(f"    {line}\n" for line in lines)


def _lines_for(text: str, momentum: bool) -> str:
    """The text without comments, and without lines that a comment keeps for the other kind of memory."""
    wanted = {"": True, "momentum": momentum, "no momentum": not momentum}
    lines = (line.partition("#") for line in text.splitlines())
    return "\n".join(code for code, _, comment in lines if code.strip() and wanted[comment.strip()])
