"""The exact memory rule as one Triton kernel; memory and momentum never leave the chip between tokens.

``docs/mathematics.md``, sections 2 and 3, with its symbols; ``p'`` is written ``p_before``. One program
takes one batch row, one head and ``BLOCK_V`` columns of the memory, from the first token to the last.
Columns of the memory do not see each other, so any cut of them gives the same result.

TensorRT gives a plugin one launch and no workspace, and its ahead-of-time path passes pointers and 32-bit
integers only, inputs before integers before outputs: hence one kernel, its parameters in this order, and
every size but ``T`` a constant.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` from the annotations themselves.
import triton
import triton.language as tl


@triton.jit
def neural_memory_kernel(
    query,
    key,
    value,
    log_retention,
    log_momentum,
    step,
    edit,
    past_memory,
    past_momentum,
    T,
    output,
    present_memory,
    present_momentum,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The contract of ``titans::NeuralMemory`` for contiguous float32 tensors.

    Args:
        query: ``(B, H, T, DK)``; what follows up to ``past_momentum`` likewise as the operator says.
        key: see there.
        value: see there.
        log_retention: see there.
        log_momentum: see there.
        step: see there.
        edit: see there.
        past_memory: see there.
        past_momentum: see there.
        T: tokens, 1 or more.
        output: ``(B, H, T, DV)``.
        present_memory: ``(B, H, DK, DV)``.
        present_momentum: ``(B, H, DK, DV)``.
        H: heads.
        DK: key width.
        DV: value width.
        TILE: tokens taken at once for ``T > 1``; a power of two, 16 or more. Changes rounding only.
        BLOCK_K: ``DK``, rounded up to a power of two, 16 or more.
        BLOCK_V: columns of the memory for each program; a power of two, 16 or more.

    The grid is ``(B H, ⌈DV / BLOCK_V⌉)``.
    """
    stream = tl.program_id(0).to(tl.int64)  # b H + h
    k_at = tl.arange(0, BLOCK_K)
    v_at = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_in, v_in = k_at < DK, v_at < DV
    state_at = stream * DK * DV + k_at[:, None] * DV + v_at[None, :]
    state_in = k_in[:, None] & v_in[None, :]
    m = tl.load(past_memory + state_at, mask=state_in, other=0.0)  # (BLOCK_K, BLOCK_V)
    s = tl.load(past_momentum + state_at, mask=state_in, other=0.0)
    strength = tl.load(edit + stream // H)

    if T == 1:  # the rule as it is written
        a = tl.exp(tl.load(log_retention + stream))
        eta = tl.exp(tl.load(log_momentum + stream))
        theta = tl.load(step + stream)
        k = tl.load(key + stream * DK + k_at, mask=k_in, other=0.0)
        q = tl.load(query + stream * DK + k_at, mask=k_in, other=0.0)
        v = tl.load(value + stream * DV + v_at, mask=v_in, other=0.0)
        error = v - strength * tl.sum(m * k[:, None], axis=0)
        s = eta * s + (theta * k)[:, None] * error[None, :]
        m = a * m + s
        tl.store(output + stream * DV + v_at, tl.sum(m * q[:, None], axis=0), mask=v_in)
    else:
        row = tl.arange(0, TILE)
        t, i = row[:, None], row[None, :]
        shift = tl.where(i == t - 1, 1.0, 0.0)  # shift @ X is X, one row down
        start = 0
        while start < T:  # not `range`: the interpreter of Triton 3.6 cannot count to a tensor with NumPy 2.4
            live = start + row < T
            token = stream * T + start + row
            la = tl.load(log_retention + token, mask=live, other=0.0)
            le = tl.load(log_momentum + token, mask=live, other=0.0)
            theta = tl.load(step + token, mask=live, other=0.0)  # what is not there writes nothing
            k_row_in = live[:, None] & k_in[None, :]
            v_row_in = live[:, None] & v_in[None, :]
            k_tile = token[:, None] * DK + k_at[None, :]
            v_tile = token[:, None] * DV + v_at[None, :]
            q = tl.load(query + k_tile, mask=k_row_in, other=0.0)  # (TILE, BLOCK_K)
            k = tl.load(key + k_tile, mask=k_row_in, other=0.0)
            v = tl.load(value + v_tile, mask=v_row_in, other=0.0)  # (TILE, BLOCK_V)
            k_t = tl.trans(k)

            # Segment sums: differences of one cumulative sum would lose digits, and be NaN at -inf.
            p = tl.exp(tl.cumsum(la, axis=0))
            c = tl.exp(tl.cumsum(le, axis=0))
            big_a = tl.exp(tl.cumsum(tl.where(t > i, la[:, None], 0.0), axis=0))
            big_e = tl.exp(tl.cumsum(tl.where(t > i, le[:, None], 0.0), axis=0))
            big_a = tl.where(t >= i, big_a, 0.0)
            big_e = tl.where(t >= i, big_e, 0.0)
            w = tl.dot(big_a, big_e, input_precision="ieee")
            r = tl.sum(big_a * c[None, :], axis=1)

            u = theta[:, None] * v
            if strength != 0.0:
                w_before = tl.dot(shift, w, input_precision="ieee")
                p_before = tl.where(row == 0, 1.0, tl.sum(shift * p[None, :], axis=1))
                r_before = tl.sum(shift * r[None, :], axis=1)
                rate = (strength * theta)[:, None]
                n = rate * w_before * tl.dot(k, k_t, input_precision="ieee")
                seen = p_before[:, None] * tl.dot(k, m, input_precision="ieee")
                seen += r_before[:, None] * tl.dot(k, s, input_precision="ieee")
                # (I + N)⁻¹ by doubling diagonal blocks; a Neumann product fails where keys repeat.
                inverse = tl.where(t == i, 1.0, 0.0)
                for half in tl.static_range(0, 8):
                    if (1 << half) < TILE:
                        below = ((t >> half) & 1 == 1) & ((i >> half) & 1 == 0)
                        corner = tl.where((t >> (half + 1) == i >> (half + 1)) & below, n, 0.0)
                        if half == 0:
                            inverse -= corner
                        else:
                            left = tl.dot(inverse, corner, input_precision="ieee")
                            inverse -= tl.dot(left, inverse, input_precision="ieee")
                u = tl.dot(inverse, u - rate * seen, input_precision="ieee")

            y = tl.dot(w * tl.dot(q, k_t, input_precision="ieee"), u, input_precision="ieee")
            y += p[:, None] * tl.dot(q, m, input_precision="ieee")
            y += r[:, None] * tl.dot(q, s, input_precision="ieee")
            tl.store(output + v_tile, y, mask=v_row_in)

            # The state behind the last token that is there: behind it, momentum would flow on.
            end = tl.minimum(T - start, TILE) - 1
            end_w = tl.sum(tl.where(t == end, w, 0.0), axis=0)
            end_e = tl.sum(tl.where(t == end, big_e, 0.0), axis=0)
            end_p = tl.sum(tl.where(row == end, p, 0.0), axis=0)
            end_r = tl.sum(tl.where(row == end, r, 0.0), axis=0)
            end_c = tl.sum(tl.where(row == end, c, 0.0), axis=0)
            m = end_p * m + end_r * s + tl.dot(k_t, end_w[:, None] * u, input_precision="ieee")
            s = end_c * s + tl.dot(k_t, end_e[:, None] * u, input_precision="ieee")
            start += TILE

    tl.store(present_memory + state_at, m, mask=state_in)
    tl.store(present_momentum + state_at, s, mask=state_in)
