"""The operator on a GPU for long contexts: exact, in a grid of chunks of time and bins of lambda, O(T sqrt(T)) time.

The notation is that of attention_triton.py: receivers sum up rows of sources; in the forward pass queries receive the rows (V_j, 1) of
keys, in the backward pass keys receive the rows (dout_i, -delta_i) of queries. With x = lambda / temperature and the log weights
w (of a key bias_j - c_j, of a query c_i, in the backward pass less lse_i) the exponent of a pair is w_r + w_s - |x_r - x_s|.

A chunk is C consecutive tokens. A bin is a run of about equally many items in the merged order of all keys and queries by lambda (keys
first at ties), cut where a sample of them says; the items of a bin are kept in the order of time. A receiver's sources, those of its past
(backward: of its future), are split in three:

    the same chunk                    tile by tile, by definition (grid_kernel)
    another chunk, the same bin       tile by tile over the bin's items, masked by chunk (bin_kernel)
    another chunk, another bin        a row for each bin, the sum of its sources in other chunks: up for the bins below the receiver,
                                      down for those above (grid_kernel)

The rows are running sums over each bin's sources in the order of time (backward: against it), of which there are two for each source
(sum_kernel); the receivers of a chunk look up the last one before their chunk (backward: the first one after it):

    up   = sum_s exp(w_s + x_s - m) row_s      which counts exp(w_r - x_r + m) times
    down = sum_s exp(w_s - x_s - m) row_s      which counts exp(w_r + x_r + m) times

m, the greatest exponent in the sum, is kept beside it in float64: no sum overflows or vanishes, however sharp the temperature or long
the decay. The rows are float32, in the backward pass of the dtype of the values. A receiver sums about C + T/K pairs and K rows; the
running sums take 2 T (D + 3) numbers a head. Every sum has one owner: no atomics, and the same sizes give the same bits."""

import torch
import triton
import triton.language as tl

from ops.attention_triton import (
    INTERPRETED,
    NOTHING,
    PAD,
    QUERIES_BLOCK,
    add_far,
    cdiv,
    entries,
    launch_queries,
    padded,
    product,
    rows,
    store_gradients,
    store_values,
    strides,
    tuned,
    width,
)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def split(y):
    """(a, b), float32, of float64 y = a + b, a a multiple of 1/4: sums of several a are exact up to 2^22."""
    a = tl.floor(4 * y + 0.5) * 0.25
    return a.to(tl.float32), (y - a).to(tl.float32)


@triton.jit
def zeros_of_product(M: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Zeros (M,), in the layout of a product's rows: what they are added to is then where the next product needs it."""
    if INTERPRET:
        return tl.zeros([M], tl.float32)
    return tl.sum(tl.dot(tl.zeros([M, 16], TYPE), tl.zeros([16, WIDTH], TYPE)), 1)


@triton.jit
def product_of_sums(P, sums, TYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """P @ sums by products of TYPE: sums that are wider are the sum of two of TYPE."""
    high = sums.to(TYPE)
    result = product(P, high, INTERPRET)
    if sums.dtype != TYPE:
        result += product(P, (sums - high.to(sums.dtype)).to(TYPE), INTERPRET)
    return result


@triton.jit
def tile(plus, minus, one_plus, one_minus, scale, x, w, s, seen, sharpness, source_x, source_w, source_one, source, source_t, d, T,
         D: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Add the sources s (N,) to the receivers' sums where seen (M, N). The sums are in units of exp(scale)."""
    row = rows(source, s, d, source_t, T, D, WIDTH, False)
    y, u = entries(source_x, s, T, 0.0), entries(source_w, s, T, 0.0)
    one = entries(source_one, s, T, 0.0) if BACKWARD else y  # in the forward pass it is 1 and not asked for
    distance = x[:, None] - y[None, :]
    w_a, w_b = split(w)  # with a decay two running sums, whose difference is small
    u_a, u_b = split(u)
    e = (w_a[:, None] + u_a[None, :]) + (w_b[:, None] + u_b[None, :])
    e = tl.where(seen, e - tl.abs(distance) * sharpness, float("-inf"))
    return add_far(plus, minus, one_plus, one_minus, scale, e, distance, row, one, BACKWARD, INTERPRET)


@triton.jit
def places(lambda_q, lambda_k, t, mask, side):
    """Where the items t of a side, 0 for keys and 1 for queries, stand in the merged order, int64: by lambda, at ties keys first, then by
    time."""
    x = tl.load(lambda_k + t, mask=mask & (side == 0), other=0.0) + tl.load(lambda_q + t, mask=mask & (side == 1), other=0.0)
    bits = x.to(tl.int32, bitcast=True)  # never -0: one of the two is 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
    return (bits.to(tl.int64) << 32) | (side.to(tl.int64) << 31) | t.to(tl.int64)


def sample_kernel(lambda_q, lambda_k, sample, H, KEYS, T, S, SAMPLE: tl.constexpr):
    """Writes the places of S of a head's 2T items, in order: sample (heads, SAMPLE)."""
    head = tl.program_id(0).to(tl.int64)
    lambda_q, lambda_k = lambda_q + head * T, lambda_k + (head // H * KEYS + head % H // (H // KEYS)) * T
    n = tl.arange(0, SAMPLE)
    item = n.to(tl.int64) * 2 * T // S
    place = places(lambda_q, lambda_k, item % T, n < S, (item // T).to(tl.int32))
    tl.store(sample + head * SAMPLE + n, tl.sort(tl.where(n < S, place, 0x7FFFFFFFFFFFFFFF)))


def count_kernel(lambda_q, lambda_k, sample, bins, counts, H, KEYS, T, K, S,
                 SAMPLE: tl.constexpr, C: tl.constexpr, KB: tl.constexpr):  # fmt: skip
    """Writes the bins of a chunk's keys or queries, bins (2, heads, T), and how many each bin has, counts (2, heads, chunks, K). A bin
    begins at every K-th part of the sample."""
    head, chunk, side = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    lambda_q, lambda_k = lambda_q + head * T, lambda_k + (head // H * KEYS + head % H // (H // KEYS)) * T
    t = chunk * C + tl.arange(0, C)
    place = places(lambda_q, lambda_k, t, t < T, side + tl.zeros([C], tl.int32))
    b = tl.zeros([C], tl.int32)
    for first in range(0, K, KB):
        k = first + tl.arange(0, KB)
        begin = tl.load(sample + head * SAMPLE + k * S // K, mask=k < K, other=0)
        b += tl.sum(((begin[None, :] <= place[:, None]) & ((k > 0) & (k < K))[None, :]).to(tl.int32), 1)
    b = tl.where(t < T, b, -1)
    row = side * tl.num_programs(0) + head
    tl.store(bins + row * T + t, b, mask=t < T)
    for first in range(0, K, KB):
        k = first + tl.arange(0, KB)
        count = tl.sum((b[None, :] == k[:, None]).to(tl.int32), 1)
        tl.store(counts + (row * tl.num_programs(1) + chunk) * K + k, count, mask=k < K)


def before_kernel(counts, before, chunks, K, R: tl.constexpr, KB: tl.constexpr):
    """Writes how many items of KB bins are in the chunks before each, before (heads, chunks + 1, K)."""
    head, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * KB + tl.arange(0, KB)
    counts, before = counts + head * chunks * K, before + head * (chunks + 1) * K
    so_far = tl.zeros([KB], tl.int32)
    for first in range(0, chunks, R):
        chunk = first + tl.arange(0, R)
        inside = (chunk < chunks)[:, None] & (k < K)[None, :]
        place = chunk[:, None] * K + k[None, :]
        count = tl.load(counts + place, mask=inside, other=0)
        tl.store(before + place, so_far[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        so_far += tl.sum(count, 0)
    tl.store(before + chunks * K + k, so_far, mask=k < K)


def order_kernel(bins, start, before, order, T, K, C: tl.constexpr):
    """Writes the tokens of a chunk to their places in the order of bins and, in a bin, of time: order (heads, T)."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, C)
    t = chunk * C + c
    b = tl.load(bins + head * T + t, mask=t < T, other=0)
    earlier = tl.sum(((b[None, :] == b[:, None]) & (c[None, :] < c[:, None])).to(tl.int32), 1)
    place = tl.load(start + head * (K + 1) + b) + tl.load(before + (head * (tl.num_programs(1) + 1) + chunk) * K + b) + earlier
    tl.store(order + head * T + place, t, mask=t < T)


def bin_kernel(receiver_x, receiver_w, receiver_order, receiver_start, source_x, source_w, source_one, source_order, source_start,
               source_before, source, temperature, sums, ones, source_b, source_h, source_t, H, RECEIVERS, SOURCES, GROUP, T, C, K,
               D: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr,
               M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Writes, for M of a bin's receivers, the sums over the bin's sources in other chunks: sums (2, B, H, T, D) and ones (3, B, H, T)."""
    head, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(0).to(tl.int64)
    receiver_start += head * (K + 1) + k
    b, h = head // H, head % H
    receiver_x += (b * RECEIVERS + h // (H // RECEIVERS)) * T
    source_x += (b * SOURCES + h // (H // SOURCES)) * T
    source += b * source_b + h // GROUP * source_h
    receiver_w, source_w = receiver_w + head * T, source_w + head * T
    if BACKWARD:
        source_one += head * T
    receiver_order, source_order = receiver_order + head * T, source_order + head * T
    source_start += head * (K + 1) + k
    source_before += head * (tl.cdiv(T, C) + 1) * K + k
    sharpness = (1 / tl.load(temperature + h)).to(tl.float32)
    d = tl.arange(0, WIDTH)
    last = tl.load(receiver_start + 1)
    for first in range(tl.load(receiver_start) + tl.program_id(2) * M, last, tl.num_programs(2) * M):
        place = first + tl.arange(0, M)
        r = tl.load(receiver_order + place, mask=place < last, other=T)
        x, w = entries(receiver_x, r, T, 0.0), entries(receiver_w, r, T, 0.0)
        zeros = zeros_of_product(M, WIDTH, source.dtype.element_ty, INTERPRET)
        x, w = x + zeros, w + zeros
        begin, end = tl.load(source_start), tl.load(source_start + 1)
        if BACKWARD:  # the chunks after that of the first receiver
            begin += tl.load(source_before + (tl.load(receiver_order + first) // C + 1) * K)
        else:  # those before that of the last
            end = begin + tl.load(source_before + tl.load(receiver_order + tl.minimum(first + M, last) - 1) // C * K)
        plus = tl.zeros([M, WIDTH], tl.float32)
        minus = tl.zeros([M, WIDTH], tl.float32)
        one_plus = tl.zeros([M], tl.float32)
        one_minus = tl.zeros([M], tl.float32)
        scale = tl.full([M], NOTHING, tl.float32)
        for start in range(begin, end, N):
            at = start + tl.arange(0, N)
            s = tl.load(source_order + at, mask=at < end, other=T)
            seen = (s // C)[None, :] > (r // C)[:, None] if BACKWARD else (s // C)[None, :] < (r // C)[:, None]
            seen = seen & (at < end)[None, :]
            plus, minus, one_plus, one_minus, scale = tile(
                plus, minus, one_plus, one_minus, scale, x, w, s, seen, sharpness, source_x, source_w, source_one, source, source_t, d, T,
                D, WIDTH, BACKWARD, INTERPRET)  # fmt: skip
        inside, r64 = (r < T)[:, None] & (d < D)[None, :], r.to(tl.int64)
        to = sums + (head * T + r64)[:, None] * D + d[None, :]
        tl.store(to, plus, mask=inside)
        tl.store(to + heads * T * D, minus, mask=inside)
        to_one = ones + head * T + r64
        tl.store(to_one, one_plus, mask=r < T)
        tl.store(to_one + heads * T, one_minus, mask=r < T)
        tl.store(to_one + 2 * heads * T, scale, mask=r < T)


def sum_kernel(source_x, source_w, source_one, source_order, source_start, source, temperature, table, ones, scales,
               source_b, source_h, source_t, H, SOURCES, GROUP, T, K,
               D: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Writes the running sums, up or down, of a bin's sources in the order of time (backward: against it): table (2, B, H, T, D), ones
    and scales (2, B, H, T), in the order of bins. A tile's sums are a matrix product with the sources' weights in units of exp(reach_n),
    reach_n the greatest exponent so far, plus the state before it."""
    head, k, down = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, h = head // H, head % H
    source_x += (b * SOURCES + h // (H // SOURCES)) * T
    source += b * source_b + h // GROUP * source_h
    source_w, source_order = source_w + head * T, source_order + head * T
    source_start += head * (K + 1) + k
    begin, end = tl.load(source_start), tl.load(source_start + 1)
    sharpness = 1 / tl.load(temperature + h)
    n, d = tl.arange(0, N), tl.arange(0, WIDTH)
    state = tl.zeros([WIDTH], tl.float32)
    state_one = 0.0
    m = sharpness * 0 + NOTHING
    for done in range(0, end - begin, N):
        there = done + n < end - begin
        at = end - 1 - done - n if BACKWARD else begin + done + n
        s = tl.load(source_order + at, mask=there, other=T)
        row = rows(source, s, d, source_t, T, D, WIDTH, False)
        x = entries(source_x, s, T, 0.0).to(tl.float64) * sharpness
        u = tl.where(there, entries(source_w, s, T, 0.0) + tl.where(down > 0, -x, x), NOTHING)
        reach = tl.maximum(tl.associative_scan(u, 0, maximum), m)
        P = tl.exp(tl.where(n[None, :] <= n[:, None], u[None, :] - reach[:, None], NOTHING).to(tl.float32)).to(row.dtype).to(tl.float32)
        kept = tl.exp((m - reach).to(tl.float32))
        summed = product(P, row, INTERPRET) + kept[:, None] * state[None, :]
        if BACKWARD:
            P *= entries(source_one + head * T, s, T, 0.0)[None, :]
        one = tl.sum(P, 1) + kept * state_one
        to = (down * tl.num_programs(0).to(tl.int64) + head) * T + at
        tl.store(table + to[:, None] * D + d[None, :], summed, mask=there[:, None] & (d < D)[None, :])
        tl.store(ones + to, one, mask=there)
        tl.store(scales + to, reach, mask=there)
        state = tl.sum(tl.where(n[:, None] == N - 1, summed, 0.0), 0)
        state_one = tl.sum(tl.where(n == N - 1, one, 0.0), 0)
        m = tl.max(reach, 0)


def grid_kernel(receiver_x, receiver_w, receiver_bin, source_x, source_w, source_one, source_start, source_before, source, v,
                temperature, table, table_ones, table_scales, sums, ones, out, lse, spread, grad_k, grad_weight, moment, sink,
                source_b, source_h, source_t, v_b, v_h, v_t, out_b, out_h, out_t, H, RECEIVERS, SOURCES, GROUP, T, C, K,
                D: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Adds up the three parts of M receivers of one chunk; writes what attention_triton.sums_kernel writes."""
    head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * M
    heads = tl.num_programs(0).to(tl.int64)
    b, h = head // H, head % H
    receiver_x += (b * RECEIVERS + h // (H // RECEIVERS)) * T
    source_x += (b * SOURCES + h // (H // SOURCES)) * T
    source += b * source_b + h // (GROUP if not BACKWARD else 1) * source_h
    receiver_w, source_w = receiver_w + head * T, source_w + head * T
    if BACKWARD:
        source_one += head * T
    r, d = first + tl.arange(0, M), tl.arange(0, WIDTH)
    x, w = entries(receiver_x, r, T, 0.0), entries(receiver_w, r, T, 0.0)
    zeros = zeros_of_product(M, WIDTH, source.dtype.element_ty, INTERPRET)
    x, w = x + zeros, w + zeros
    fine = 1 / tl.load(temperature + h)
    sharpness = fine.to(tl.float32)
    r64 = r.to(tl.int64)
    inside = (r < T)[:, None] & (d < D)[None, :]

    place = sums + (head * T + r64)[:, None] * D + d[None, :]
    plus = tl.load(place, mask=inside, other=0.0)
    minus = tl.load(place + heads * T * D, mask=inside, other=0.0)
    one_plus = entries(ones + head * T, r, T, 0.0)
    one_minus = entries(ones + (heads + head) * T, r, T, 0.0)
    scale = entries(ones + (2 * heads + head) * T, r, T, NOTHING)

    chunk, position = first // C, x.to(tl.float64) * fine
    edge = tl.load(receiver_w + first)  # so that no sum is of great numbers
    up_a, up_b = split(w - edge - position)
    down_a, down_b = split(w - edge + position)
    bin = tl.load(receiver_bin + head * T + r, mask=r < T, other=0) + zeros.to(tl.int32)
    source_start, source_before = source_start + head * (K + 1), source_before + (head * (tl.cdiv(T, C) + 1) + chunk) * K
    for start in range(0, K, N):
        k = start + tl.arange(0, N)
        at, end = tl.load(source_start + k, mask=k < K, other=0), tl.load(source_start + k + 1, mask=k < K, other=0)
        if BACKWARD:  # the first source after the chunk
            at += tl.load(source_before + K + k, mask=k < K, other=0)
            there = at < end
        else:  # the last one before it
            before = tl.load(source_before + k, mask=k < K, other=0)
            at, there = at + before - 1, before > 0
        at = head * T + at
        m_a, m_b = split(tl.load(table_scales + at, mask=there, other=0.0) + edge)
        n_a, n_b = split(tl.load(table_scales + heads * T + at, mask=there, other=0.0) + edge)
        lower = k[None, :] < bin[:, None]
        e = tl.where(lower, up_a[:, None] + m_a[None, :], down_a[:, None] + n_a[None, :])
        e += tl.where(lower, up_b[:, None] + m_b[None, :], down_b[:, None] + n_b[None, :])
        e = tl.where((k[None, :] != bin[:, None]) & there[None, :], e, float("-inf"))
        higher = tl.maximum(scale, tl.max(e, 1))
        P, kept = tl.exp(e - higher[:, None]).to(source.dtype.element_ty).to(tl.float32), tl.exp(scale - higher)
        plus, minus, one_plus, one_minus, scale = plus * kept[:, None], minus * kept[:, None], one_plus * kept, one_minus * kept, higher
        P_up, P_down = tl.where(lower, P, 0.0), tl.where(lower, 0.0, P)
        mask = there[:, None] & (d < D)[None, :]
        row_up = tl.load(table + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        row_down = tl.load(table + (heads * T + at)[:, None] * D + d[None, :], mask=mask, other=0.0)
        one_up = tl.load(table_ones + at, mask=there, other=0.0)[None, :]
        one_down = tl.load(table_ones + heads * T + at, mask=there, other=0.0)[None, :]
        below, one_below = product_of_sums(P_up, row_up, source.dtype.element_ty, INTERPRET), tl.sum(P_up * one_up, 1)
        above, one_above = product_of_sums(P_down, row_down, source.dtype.element_ty, INTERPRET), tl.sum(P_down * one_down, 1)
        if BACKWARD:  # plus: the query is above the key
            plus, minus, one_plus, one_minus = plus + above, minus + below, one_plus + one_above, one_minus + one_below
        else:
            plus, minus, one_plus, one_minus = plus + below, minus + above, one_plus + one_below, one_minus + one_above

    begin, end = (first, tl.minimum(chunk * C + C, T)) if BACKWARD else (chunk * C, tl.minimum(first + M, T))
    for start in range(begin, end, N):
        s = start + tl.arange(0, N)
        seen = s[None, :] >= r[:, None] if BACKWARD else s[None, :] <= r[:, None]
        seen = seen & (s < end)[None, :]
        plus, minus, one_plus, one_minus, scale = tile(
            plus, minus, one_plus, one_minus, scale, x, w, s, seen, sharpness, source_x, source_w, source_one, source, source_t, d, T,
            D, WIDTH, BACKWARD, INTERPRET)  # fmt: skip

    out += b * out_b + h * out_h
    if BACKWARD:
        v += b * v_b + h // GROUP * v_h
        store_gradients(plus, minus, one_plus, one_minus, scale, -x, sharpness, v, out, grad_k, grad_weight, moment, head, r, d, v_t, out_t,
                        T, D, WIDTH)  # fmt: skip
    else:
        store_values(plus, minus, one_plus, one_minus, scale, sink, out, spread, lse, head, h, r, d, out_t, T, D)


# (M receivers, N sources, warps, most registers per thread): autotuning picks one for bin_kernel and grid_kernel each; (N sources, warps)
# of sum_kernel
TILES, SUM_TILES = [(64, 32, 4, 168), (64, 32, 4, None), (64, 64, 8, None), (64, 32, 8, 128)], [(64, 4), (32, 4), (64, 8)]
CHUNK, SAMPLE, COUNT_BINS, BEFORE_CHUNKS, BEFORE_BINS = 64, 2048, 64, 64, 16


def launcher(kernel, tiles):
    """tiles: (the kernel's constants, warps, most registers per thread)."""
    kernel = triton.jit(kernel)
    if INTERPRETED:  # autotuning needs a device
        return lambda grid, *args: kernel[grid(tiles[0][0])](*args, **tiles[0][0])
    configs = [triton.Config(tile, num_warps=warps, num_stages=2, maxnreg=registers) for tile, warps, registers in tiles]
    return tuned(kernel, configs, ["WIDTH", "BACKWARD", "K"])


PAIRS = [({"M": M, "N": N}, warps, registers) for M, N, warps, registers in TILES]
SUMS = [({"N": N}, warps, None) for N, warps in SUM_TILES]
launch_bins, launch_grid = launcher(bin_kernel, PAIRS), launcher(grid_kernel, PAIRS)
launch_sums = launcher(sum_kernel, SUMS)
launch_sample, launch_count = triton.jit(sample_kernel), triton.jit(count_kernel)
launch_before, launch_order = triton.jit(before_kernel), triton.jit(order_kernel)


def sizes(T):
    """(C, K): tokens a chunk, a multiple of every M, and bins."""
    return CHUNK, 1 << max(4, (int(T).bit_length() - 1) // 2 - 1)


class Bins:
    """Where keys and queries stand in their merged order. A pair of each, for keys and for queries, int32: bin (B, H, T); order
    (B, H, T), the tokens by bin and, in a bin, by time; start (B, H, K + 1), where in it each bin begins; before (B, H, chunks + 1, K),
    how many of a bin are in the chunks before each. All of them are parts of `all`, by which the backward pass has them again."""

    def __init__(self, lambda_q, lambda_k, all=None):
        (B, H, T), KEYS = lambda_q.shape, lambda_k.shape[1]
        self.C, self.K = C, K = sizes(T)
        chunks, S = cdiv(T, C), min(SAMPLE, 2 * T)
        numbers = dict(dtype=torch.int32, device=lambda_q.device)
        self.all = torch.empty(sum(Bins.parts(B, H, T)), **numbers) if all is None else all
        parts = self.all.split(Bins.parts(B, H, T))
        self.bin, self.order = (part.view(2, B, H, T) for part in parts[:2])
        self.start, self.before = parts[2].view(2, B, H, K + 1), parts[3].view(2, B, H, chunks + 1, K)
        if all is not None:
            return
        sample, counts = torch.empty(B, H, SAMPLE, dtype=torch.int64, device=lambda_q.device), torch.empty(2, B, H, chunks, K, **numbers)
        launch_sample[(B * H,)](lambda_q, lambda_k, sample, H, KEYS, T, S, SAMPLE)
        launch_count[B * H, chunks, 2](lambda_q, lambda_k, sample, self.bin, counts, H, KEYS, T, K, S, SAMPLE, C, COUNT_BINS)
        launch_before[2 * B * H, cdiv(K, BEFORE_BINS)](counts, self.before, chunks, K, BEFORE_CHUNKS, BEFORE_BINS)
        self.start[..., 0] = 0
        self.start[..., 1:] = self.before[..., -1, :].cumsum(-1)
        launch_order[2 * B * H, chunks](self.bin, self.start, self.before, self.order, T, K, C)

    @staticmethod
    def parts(B, H, T):
        """How many numbers bin, order, start and before have."""
        C, K = sizes(T)
        return [2 * B * H * n for n in (T, T, K + 1, (cdiv(T, C) + 1) * K)]


def sums(lambda_q, lambda_k, weights, one, source, v, temperature, outputs, bins, backward):
    """weights: the log weights (B, H, T) of keys and of queries; one (B, H, T), or None if it is 1, and source (B, heads, T, D): the
    sources' rows."""
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    x, (keys, queries), group, C, K = (lambda_k, lambda_q), (0, 1), H // v.shape[1], bins.C, bins.K
    s, r = (queries, keys) if backward else (keys, queries)
    group_s = 1 if backward else group  # query heads that share a head of `source`
    heads, shapes = (x[r].shape[1], x[s].shape[1]), dict(dtype=torch.float32, device=v.device)
    part, ones = torch.empty(2, B, H, T, D, **shapes), torch.empty(3, B, H, T, **shapes)
    table = torch.empty(2, B, H, T, D, dtype=v.dtype if backward else torch.float32, device=v.device)
    table_ones = torch.empty(2, B, H, T, **shapes)
    scales = torch.empty_like(table_ones, dtype=torch.float64)
    launch_bins(
        lambda tile: (B * H, K, cdiv(2 * T, K * tile["M"])),
        x[r], weights[r], bins.order[r], bins.start[r], x[s], weights[s], one, bins.order[s], bins.start[s], bins.before[s], source,
        temperature, part, ones, *strides(source), H, *heads, group_s, T, C, K, D, width(D), backward, INTERPRETED)  # fmt: skip
    launch_sums(
        lambda tile: (B * H, K, 2),
        x[s], weights[s], one, bins.order[s], bins.start[s], source, temperature, table, table_ones, scales, *strides(source), H, heads[1],
        group_s, T, K, D, width(D), backward, INTERPRETED)  # fmt: skip
    out, *others = outputs
    launch_grid(
        lambda tile: (B * H, cdiv(T, tile["M"])),
        x[r], weights[r], bins.bin[r], x[s], weights[s], one, bins.start[s], bins.before[s], source, v, temperature, table, table_ones,
        scales, part, ones, out, *others, *strides(source, v, out), H, *heads, group, T, C, K, D, width(D), backward,
        INTERPRETED)  # fmt: skip


def log_weights(lambda_q, temperature, decay, bias):
    """(of keys, of queries), each (B, H, T) float64."""
    of_queries = torch.zeros_like(lambda_q, dtype=temperature.dtype) if decay is None else decay
    if bias is not None and bias.shape[1] < lambda_q.shape[1]:
        bias = bias.repeat_interleave(lambda_q.shape[1] // bias.shape[1], 1)
    of_keys = -of_queries if bias is None else bias - of_queries
    return of_keys, of_queries


def forward(lambda_q, lambda_k, v, temperature, decay, bias, sink=None):
    """As attention_triton.forward(), but the last of what it returns is Bins.all."""
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    out, lse = v.new_empty(B, T, H, D).transpose(1, 2), temperature.new_empty(B, H, T)
    spread = v.new_empty(2, B, H, T, D)
    bins = Bins(lambda_q, lambda_k)
    sums(lambda_q, lambda_k, log_weights(lambda_q, temperature, decay, bias), None, v, v, temperature,
         (out, lse, spread, None, None, None, sink), bins, False)  # fmt: skip
    return out, lse, spread, bins.all


def backward(grad, lambda_q, lambda_k, v, temperature, decay, bias, out, lse, spread, bins):
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    group = H // v.shape[1]
    factors, weight, moment = lambda_q.new_empty(B, H, padded(T), 4), lambda_q.new_empty(B, H, T), lambda_q.new_empty(2, B, H, T)
    grad_q, grad_k, grad_weight = torch.empty_like(lambda_q), torch.empty_like(lambda_q), temperature.new_empty(B, H, T)
    source, grad_v = v.new_empty(B, H, padded(T), D), (v if group == 1 else lambda_q).new_empty(B, T, H, D).transpose(1, 2)
    launch_queries[B * H, padded(T) // QUERIES_BLOCK](
        lambda_q, temperature, out, lse, spread, lambda_q.new_zeros(B, H, 2), grad, factors, weight, source, grad_q, moment[0],
        *strides(out, grad), H, T, D, width(D), PAD, QUERIES_BLOCK)  # fmt: skip
    one = factors[:, :, :T, 3].contiguous()
    of_keys, of_queries = log_weights(lambda_q, temperature, decay, bias)
    sums(lambda_q, lambda_k, (of_keys, of_queries - lse), one, source, v, temperature,
         (grad_v, None, None, grad_k, grad_weight, moment[1], None), Bins(lambda_q, lambda_k, bins), True)  # fmt: skip
    if group > 1:
        grad_k = grad_k.unflatten(1, (-1, group)).sum(2)
        grad_v = grad_v.transpose(1, 2).unflatten(2, (-1, group)).sum(3).to(v.dtype).transpose(1, 2)
    return grad_q, grad_k, grad_v, moment.sum((0, 1, 3), dtype=temperature.dtype), grad_weight
