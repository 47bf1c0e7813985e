"""The operator on a GPU for long contexts: exact, in a grid of chunks of time and bins of lambda, O(T sqrt(T)) time.

The notation is that of attention_triton.py: receivers sum up rows of sources; in the forward pass queries receive the rows (V_j, 1) of
keys, in the backward pass keys receive the rows (dout_i, -delta_i) of queries. With x = lambda / temperature and the log weights
w (of a key bias_j - c_j, of a query c_i, in the backward pass less lse_i) the exponent of a pair is w_r + w_s - |x_r - x_s|.

A chunk is C consecutive tokens. A bin is a run of equally many items in the merged order of all keys and queries by lambda (keys first
at ties). A receiver's sources, those of its past (backward: of its future), are split in three:

    the same chunk                    tile by tile, by definition (grid_kernel)
    another chunk, the same bin       tile by tile over the bin's items, masked by chunk (bin_kernel)
    another chunk, another bin        two rows of a table: for every chunk and bin the sums of the sources of the chunks before
                                      (backward: after) in the bins below, up, and above, down (chunk_kernel, scan_kernel):

        up   = sum_s exp(w_s + x_s - m) row_s      which counts exp(w_r - x_r + m) times
        down = sum_s exp(w_s - x_s - m) row_s      which counts exp(w_r + x_r + m) times

m, the greatest exponent in the sum, is kept beside it in float64: no sum overflows or vanishes, however sharp the temperature or long
the decay. A receiver sums C + 2T/K pairs at most and reads two rows; the table takes 2 (T/C) K (D + 2) numbers a head. Every sum has one
owner: no atomics, and the same sizes give the same bits."""

import torch
import triton
import triton.language as tl

from ops.attention_triton import (
    INTERPRETED,
    NOTHING,
    PAD,
    QUERIES_BLOCK,
    add,
    entries,
    launch_queries,
    one_if_deterministic,
    padded,
    product,
    rows,
    strides,
    width,
    with_sink,
)


@triton.jit
def tile(plus, minus, one_plus, one_minus, scale, x, w, s, seen, sharpness, source_x, source_w, source_one, source, source_t, d, T,
         D: tl.constexpr, WIDTH: tl.constexpr, DECAY: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Add the sources s (N,) to the receivers' sums where seen (M, N). The sums are in units of exp(scale)."""
    row = rows(source, s, d, source_t, T, D, WIDTH, False)
    y, u, one = entries(source_x, s, T, 0.0), entries(source_w, s, T, 0.0), entries(source_one, s, T, 0.0)
    distance = x[:, None] - y[None, :]
    if DECAY:  # two running sums, whose difference is small
        e = (w[:, None] + u[None, :]).to(tl.float32)
    else:
        e = w.to(tl.float32)[:, None] + u.to(tl.float32)[None, :]
    e = tl.where(seen, e - tl.abs(distance) * sharpness, float("-inf"))
    higher = tl.maximum(scale, tl.max(e, 1))
    P, kept = tl.exp(e - higher[:, None]).to(row.dtype).to(tl.float32), tl.exp(scale - higher)
    below = distance <= 0 if BACKWARD else distance >= 0
    plus, minus, one_plus, one_minus = add(
        plus * kept[:, None],
        minus * kept[:, None],
        one_plus * kept,
        one_minus * kept,
        tl.where(below, P, 0.0),
        tl.where(below, 0.0, P),
        row,
        one,
        True,
        INTERPRET,
    )
    return plus, minus, one_plus, one_minus, higher


def bin_kernel(receiver_x, receiver_w, receiver_order, receiver_start, source_x, source_w, source_one, source_order, source_start, source,
               temperature, sums, ones, source_b, source_h, source_t, H, RECEIVERS, SOURCES, GROUP, T, C, K,
               D: tl.constexpr, WIDTH: tl.constexpr, DECAY: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr,
               M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Writes, for a bin's receivers, the sums over the bin's sources in other chunks: sums (2, B, H, T, D) and ones (3, B, H, T)."""
    head, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(0).to(tl.int64)
    b, h = head // H, head % H
    receiver_x += (b * RECEIVERS + h // (H // RECEIVERS)) * T
    source_x += (b * SOURCES + h // (H // SOURCES)) * T
    source += b * source_b + h // GROUP * source_h
    receiver_w, source_w, source_one = receiver_w + head * T, source_w + head * T, source_one + head * T
    receiver_order, source_order = receiver_order + head * T, source_order + head * T
    receiver_start, source_start = receiver_start + head * (K + 1) + k, source_start + head * (K + 1) + k
    begin, end = tl.load(source_start), tl.load(source_start + 1)
    sharpness = (1 / tl.load(temperature + h)).to(tl.float32)
    d = tl.arange(0, WIDTH)
    last = tl.load(receiver_start + 1)
    for first in range(tl.load(receiver_start), last, M):
        place = first + tl.arange(0, M)
        r = tl.load(receiver_order + place, mask=place < last, other=T)
        x, w = entries(receiver_x, r, T, 0.0), entries(receiver_w, r, T, 0.0)
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
                D, WIDTH, DECAY, BACKWARD, INTERPRET)  # fmt: skip
        r = r.to(tl.int64)
        inside = (r < T)[:, None] & (d < D)[None, :]
        to = sums + (head * T + r)[:, None] * D + d[None, :]
        tl.store(to, plus, mask=inside)
        tl.store(to + heads * T * D, minus, mask=inside)
        to = ones + head * T + r
        tl.store(to, one_plus, mask=r < T)
        tl.store(to + heads * T, one_minus, mask=r < T)
        tl.store(to + 2 * heads * T, scale, mask=r < T)


def chunk_kernel(source_x, source_w, source_one, source_bin, source, temperature, table, ones, scales, source_b, source_h, source_t,
                 H, SOURCES, GROUP, T, C, K,
                 D: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr,
                 KB: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Writes what a chunk adds to KB bins' up or down: table (2, B, H, chunks, K, D), ones and scales (2, B, H, chunks, K)."""
    head, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(K, KB)
    chunk, first, down = tl.program_id(1) // blocks, tl.program_id(1) % blocks * KB, tl.program_id(2)
    b, h = head // H, head % H
    source_x += (b * SOURCES + h // (H // SOURCES)) * T
    source += b * source_b + h // GROUP * source_h
    source_w, source_one, source_bin = source_w + head * T, source_one + head * T, source_bin + head * T
    sharpness = 1 / tl.load(temperature + h)
    k, d = first + tl.arange(0, KB), tl.arange(0, WIDTH)
    state = tl.zeros([KB, WIDTH], tl.float32)
    one = tl.zeros([KB], tl.float32)
    m = tl.full([KB], NOTHING, tl.float64)
    for start in range(chunk * C, tl.minimum(chunk * C + C, T), N):
        s = start + tl.arange(0, N)
        there = (s < T) & (s < chunk * C + C)
        row = rows(source, s, d, source_t, T, D, WIDTH, False)
        x = entries(source_x, s, T, 0.0).to(tl.float64) * sharpness
        u = tl.where(there, entries(source_w, s, T, 0.0) + tl.where(down > 0, -x, x), float("-inf"))
        highest = tl.max(u, 0)
        bins = tl.load(source_bin + s, mask=there, other=0)
        counts = tl.where(down > 0, bins[None, :] > k[:, None], bins[None, :] < k[:, None]) & there[None, :]
        e = tl.where(counts, (u - highest).to(tl.float32)[None, :], float("-inf"))
        new = tl.maximum(m, highest + tl.max(e, 1).to(tl.float64))
        P = tl.exp(e - (new - highest).to(tl.float32)[:, None]).to(row.dtype).to(tl.float32)
        kept = tl.exp((m - new).to(tl.float32))
        state = state * kept[:, None] + product(P, row, INTERPRET)
        one = one * kept + tl.sum(P * entries(source_one, s, T, 0.0)[None, :], 1)
        m = new
    to = ((down * tl.num_programs(0).to(tl.int64) + head) * tl.cdiv(T, C) + chunk) * K + k
    tl.store(table + to[:, None] * D + d[None, :], state, mask=(k < K)[:, None] & (d < D)[None, :])
    tl.store(ones + to, one, mask=k < K)
    tl.store(scales + to, m, mask=k < K)


def scan_kernel(table, ones, scales, chunks, K,
                D: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, KB: tl.constexpr):  # fmt: skip
    """Replaces what each chunk adds to KB bins by the sum over the chunks before it (backward: after it)."""
    k, d = tl.program_id(1) * KB + tl.arange(0, KB), tl.arange(0, WIDTH)
    inside = (k < K)[:, None] & (d < D)[None, :]
    state = tl.zeros([KB, WIDTH], tl.float32)
    one = tl.zeros([KB], tl.float32)
    m = tl.full([KB], NOTHING, tl.float64)
    for number in range(0, chunks):
        chunk = chunks - 1 - number if BACKWARD else number
        at = (tl.program_id(0).to(tl.int64) * chunks + chunk) * K + k
        place = table + at[:, None] * D + d[None, :]
        more, more_one = tl.load(place, mask=inside, other=0.0), tl.load(ones + at, mask=k < K, other=0.0)
        scale = tl.load(scales + at, mask=k < K, other=NOTHING)
        tl.store(place, state, mask=inside)
        tl.store(ones + at, one, mask=k < K)
        tl.store(scales + at, m, mask=k < K)
        new = tl.maximum(m, scale)
        kept, added = tl.exp((m - new).to(tl.float32)), tl.exp((scale - new).to(tl.float32))
        state, one, m = state * kept[:, None] + more * added[:, None], one * kept + more_one * added, new


def grid_kernel(receiver_x, receiver_w, receiver_bin, source_x, source_w, source_one, source, v, temperature, table, table_ones,
                table_scales, sums, ones, out, lse, spread, grad_k, grad_weight, moment, sink, source_b, source_h, source_t,
                v_b, v_h, v_t, out_b, out_h, out_t, H, RECEIVERS, SOURCES, GROUP, T, C, K,
                D: tl.constexpr, WIDTH: tl.constexpr, DECAY: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Adds up the three parts of M receivers of one chunk; writes what attention_triton.sums_kernel writes."""
    head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * M
    heads = tl.num_programs(0).to(tl.int64)
    b, h = head // H, head % H
    receiver_x += (b * RECEIVERS + h // (H // RECEIVERS)) * T
    source_x += (b * SOURCES + h // (H // SOURCES)) * T
    source += b * source_b + h // (GROUP if not BACKWARD else 1) * source_h
    receiver_w, source_w, source_one = receiver_w + head * T, source_w + head * T, source_one + head * T
    r, d = first + tl.arange(0, M), tl.arange(0, WIDTH)
    x, w = entries(receiver_x, r, T, 0.0), entries(receiver_w, r, T, 0.0)
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

    chunk = first // C
    at = (head * tl.cdiv(T, C) + chunk) * K + tl.load(receiver_bin + head * T + r, mask=r < T, other=0)
    more = heads * tl.cdiv(T, C) * K
    position = x.to(tl.float64) * fine
    up = (w - position + tl.load(table_scales + at)).to(tl.float32)
    down = (w + position + tl.load(table_scales + more + at)).to(tl.float32)
    higher = tl.maximum(scale, tl.maximum(up, down))
    kept, up, down = tl.exp(scale - higher), tl.exp(up - higher), tl.exp(down - higher)
    below = tl.load(table + at[:, None] * D + d[None, :], mask=inside, other=0.0) * up[:, None]
    above = tl.load(table + (more + at)[:, None] * D + d[None, :], mask=inside, other=0.0) * down[:, None]
    one_below, one_above = tl.load(table_ones + at) * up, tl.load(table_ones + more + at) * down
    if BACKWARD:  # plus: the query is above the key
        below, above = above, below
        one_below, one_above = one_above, one_below
    plus, minus = plus * kept[:, None] + below, minus * kept[:, None] + above
    one_plus, one_minus, scale = one_plus * kept + one_below, one_minus * kept + one_above, higher

    begin, end = (first, tl.minimum(chunk * C + C, T)) if BACKWARD else (chunk * C, tl.minimum(first + M, T))
    for start in range(begin, end, N):
        s = start + tl.arange(0, N)
        seen = s[None, :] >= r[:, None] if BACKWARD else s[None, :] <= r[:, None]
        seen = seen & (s < end)[None, :]
        plus, minus, one_plus, one_minus, scale = tile(
            plus, minus, one_plus, one_minus, scale, x, w, s, seen, sharpness, source_x, source_w, source_one, source, source_t, d, T,
            D, WIDTH, DECAY, BACKWARD, INTERPRET)  # fmt: skip

    place = out + b * out_b + h * out_h + r64[:, None] * out_t + d[None, :]  # out is dV in the backward pass
    if BACKWARD:
        unit = tl.exp(scale)
        total, diff = (plus + minus) * unit[:, None], (plus - minus) * unit[:, None]
        tl.store(place, total, mask=inside)
        value = rows(v + b * v_b + h // GROUP * v_h, r, d, v_t, T, D, WIDTH, False).to(tl.float32)
        db = (tl.sum(diff * value, 1) + (one_plus - one_minus) * unit) * sharpness
        tl.store(grad_k + head * T + r, db, mask=r < T)
        tl.store(grad_weight + head * T + r, tl.sum(total * value, 1) + (one_plus + one_minus) * unit, mask=r < T)
        tl.store(moment + head * T + r, -x * db * sharpness, mask=r < T)
    else:
        Z = one_plus + one_minus
        if sink is not None:
            plus, minus, one_plus, one_minus, scale, Z = with_sink(plus, minus, one_plus, one_minus, scale, tl.load(sink + h))
        total = (plus + minus) / Z[:, None]
        rounded = total.to(out.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        place = spread + (head * T + r64)[:, None] * D + d[None, :]
        tl.store(place, (plus - minus) / Z[:, None] - ((one_plus - one_minus) / Z)[:, None] * total, mask=inside)
        tl.store(place + heads * T * D, total - rounded.to(tl.float32), mask=inside)
        tl.store(lse + head * T + r, (scale + tl.log(Z)).to(tl.float64), mask=r < T)


# (M receivers, N sources, warps): autotuning picks one for bin_kernel and grid_kernel each; (KB bins, N sources, warps) of chunk_kernel
TILES, CHUNK_TILES = [(64, 32, 4), (64, 64, 8), (32, 32, 4), (32, 64, 4)], [(16, 64, 4), (32, 64, 4), (64, 64, 4)]
SCAN_BINS = 8


def launcher(kernel, tiles, rows):
    kernel = triton.jit(kernel)
    if INTERPRETED:  # autotuning needs a device
        tile = {rows: tiles[0][0], "N": tiles[0][1]}
        return lambda grid, *args: kernel[grid(tile)](*args, **tile)
    configs = [triton.Config({rows: M, "N": N}, num_warps=warps, num_stages=2) for M, N, warps in tiles]
    prune = {"early_config_prune": one_if_deterministic}
    tuned = triton.autotune(configs, key=["WIDTH", "BACKWARD", "K"], prune_configs_by=prune)(kernel)
    return lambda grid, *args: tuned[grid](*args)


launch_bins, launch_grid = launcher(bin_kernel, TILES, "M"), launcher(grid_kernel, TILES, "M")
launch_chunks, launch_scan = launcher(chunk_kernel, CHUNK_TILES, "KB"), triton.jit(scan_kernel)


def sizes(T):
    """(C, K): tokens a chunk, a multiple of every M, and bins."""
    root = 1 << max(6, round((T.bit_length() - 1) / 2))
    return root, root


class Bins:
    """Where keys and queries stand in their merged order: bin (B, H, T) of each; order (B, H, T), sorted; start (B, H, K + 1), where in
    it each bin begins; a pair of each, for keys and for queries. int32."""

    def __init__(self, lambda_q, lambda_k, K):
        B, H, T = lambda_q.shape
        items = torch.cat([lambda_k.repeat_interleave(H // lambda_k.shape[1], 1), lambda_q], -1)
        merged = items.sort(dim=-1, stable=True)[1]  # at ties keys, which come first, are below
        size, count = -(-2 * T // K), torch.arange(2 * T, device=items.device)
        position = torch.empty_like(merged).scatter_(-1, merged, count.expand_as(merged))
        keys_before = torch.nn.functional.pad((merged < T).cumsum(-1), (1, 0))  # (B, H, 2T + 1)
        edges = (torch.arange(K + 1, device=items.device) * size).clamp_max(2 * T)
        start = keys_before[..., edges]
        of_keys, of_queries = position.split(T, -1)
        rank = keys_before.gather(-1, of_keys), of_queries - keys_before.gather(-1, of_queries)
        token = torch.arange(T, dtype=torch.int32, device=items.device).expand(B, H, T)
        self.bin = [(p // size).int() for p in (of_keys, of_queries)]
        self.order = [torch.empty_like(token).scatter_(-1, r, token) for r in rank]
        self.start = [start.int(), (edges - start).int()]


def sums(lambda_q, lambda_k, weights, one, source, v, temperature, decays, outputs, bins, C, K, backward):
    """weights: the log weights (B, H, T) of keys and of queries; one (B, H, T) and source (B, heads, T, D): the sources' rows."""
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    x, (keys, queries), group = (lambda_k, lambda_q), (0, 1), H // v.shape[1]
    s, r = (queries, keys) if backward else (keys, queries)
    group_s = 1 if backward else group  # query heads that share a head of `source`
    heads, shapes = (x[r].shape[1], x[s].shape[1]), dict(dtype=torch.float32, device=v.device)
    chunks = triton.cdiv(T, C)
    part, ones = torch.empty(2, B, H, T, D, **shapes), torch.empty(3, B, H, T, **shapes)
    table, table_ones = torch.empty(2, B, H, chunks, K, D, **shapes), torch.empty(2, B, H, chunks, K, **shapes)
    scales = torch.empty_like(table_ones, dtype=torch.float64)
    launch_bins(
        lambda tile: (B * H, K),
        x[r], weights[r], bins.order[r], bins.start[r], x[s], weights[s], one, bins.order[s], bins.start[s], source, temperature,
        part, ones, *strides(source), H, *heads, group_s, T, C, K, D, width(D), decays, backward, INTERPRETED)  # fmt: skip
    launch_chunks(
        lambda tile: (B * H, chunks * triton.cdiv(K, tile["KB"]), 2),
        x[s], weights[s], one, bins.bin[s], source, temperature, table, table_ones, scales, *strides(source), H, heads[1], group_s, T, C, K,
        D, width(D), backward, INTERPRETED)  # fmt: skip
    launch_scan[2 * B * H, triton.cdiv(K, SCAN_BINS)](table, table_ones, scales, chunks, K, D, width(D), backward, SCAN_BINS)
    out, *others = outputs
    launch_grid(
        lambda tile: (B * H, triton.cdiv(T, tile["M"])),
        x[r], weights[r], bins.bin[r], x[s], weights[s], one, source, v, temperature, table, table_ones, scales, part, ones, out, *others,
        *strides(source, v, out), H, *heads, group, T, C, K, D, width(D), decays, backward, INTERPRETED)  # fmt: skip


def log_weights(lambda_q, temperature, decay, bias):
    """(of keys, of queries), each (B, H, T) float64."""
    of_queries = torch.zeros_like(lambda_q, dtype=temperature.dtype) if decay is None else decay
    of_keys = -of_queries if bias is None else bias.repeat_interleave(lambda_q.shape[1] // bias.shape[1], 1) - of_queries
    return of_keys, of_queries


def forward(lambda_q, lambda_k, v, temperature, decay, bias, sink=None):
    """As attention_triton.forward()."""
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    C, K = sizes(T)
    out, lse = v.new_empty(B, T, H, D).transpose(1, 2), temperature.new_empty(B, H, T)
    spread = v.new_empty(2, B, H, T, D)
    sums(lambda_q, lambda_k, log_weights(lambda_q, temperature, decay, bias), torch.ones_like(lambda_q), v, v, temperature,
         decay is not None, (out, lse, spread, None, None, None, sink), Bins(lambda_q, lambda_k, K), C, K, False)  # fmt: skip
    return out, lse, spread, lambda_q.new_zeros(B, H, 2)


def backward(grad, lambda_q, lambda_k, v, temperature, decay, bias, out, lse, spread, middle):
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    C, K = sizes(T)
    group = H // v.shape[1]
    factors, weight, moment = lambda_q.new_empty(B, H, padded(T), 4), lambda_q.new_empty(B, H, T), lambda_q.new_empty(2, B, H, T)
    grad_q, grad_k, grad_weight = torch.empty_like(lambda_q), torch.empty_like(lambda_q), temperature.new_empty(B, H, T)
    source, grad_v = v.new_empty(B, H, padded(T), D), (v if group == 1 else lambda_q).new_empty(B, T, H, D).transpose(1, 2)
    launch_queries[B * H, padded(T) // QUERIES_BLOCK](
        lambda_q, temperature, out, lse, spread, middle, grad, factors, weight, source, grad_q, moment[0], *strides(out, grad), H, T, D,
        width(D), PAD, QUERIES_BLOCK)  # fmt: skip
    one = factors[:, :, :T, 3].contiguous()
    of_keys, of_queries = log_weights(lambda_q, temperature, decay, bias)
    sums(lambda_q, lambda_k, (of_keys, of_queries - lse), one, source, v, temperature, decay is not None,
         (grad_v, None, None, grad_k, grad_weight, moment[1], None), Bins(lambda_q, lambda_k, K), C, K, True)  # fmt: skip
    if group > 1:
        grad_k = grad_k.unflatten(1, (-1, group)).sum(2)
        grad_v = grad_v.transpose(1, 2).unflatten(2, (-1, group)).sum(3).to(v.dtype).transpose(1, 2)
    return grad_q, grad_k, grad_v, moment.sum((0, 1, 3), dtype=temperature.dtype), grad_weight
