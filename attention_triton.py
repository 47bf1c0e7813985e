"""The operator on a GPU: flash attention's tiles (Dao 2023), with scores from two scalars in place of Q K^T.

Notation of the paper and of attention.naive, for one head, c being the running sum of log_decay:

    s_ij = -|lambda_q,i - lambda_k,j| / temperature + bias_j + c_i - c_j      j <= i
    P    = softmax_j(s),   out = P V
    dP   = dout V^T,   dS = P * (dP - delta),   delta_i = dout_i . out_i      the softmax's gradient
    dV   = P^T dout
    dlambda_q,i = -sum_j dS_ij sign_ij / temperature      sign_ij that of lambda_q,i - lambda_k,j, + at a tie
    dlambda_k,j =  sum_i dS_ij sign_ij / temperature
    dtemperature = sum_ij dS_ij |lambda_q,i - lambda_k,j| / temperature^2
    dweight_j    = sum_i dS_ij                            weight_j = bias_j - c_j; what c_i gets is sum_j dS_ij = 0

A tile is M queries by N keys. Nothing of size T x T is kept: the forward pass rescales its sums as it finds greater scores
and leaves lse, the logarithm of the softmax's denominator, from which the backward passes make P again. One backward pass goes
along the keys of each query, one along the queries of each key, so that every sum has one owner: no atomics, and with the
same tiles the same bits. Matrix products a tile: P V; dout V^T; P^T dout and dout V^T: four, where flash attention has seven.

Scores, weights and sums are float32; the products take V's type. In bfloat16 out, and with it delta, is rounded, and
sum_j dS_ij is not 0 but some r_i. The pass along the keys finds it and puts it right: delta_i + r_i is the delta that these
P and dP have. Tiles wholly in the future are not visited, nor those whose every weight has decayed below exp(-NEGLIGIBLE)
of the query's own key's (reaches()).

For long contexts there is one level of the tree (attention.Tree) as a kernel too, which takes O(T)."""

import torch
import triton
import triton.language as tl

NEGLIGIBLE = 40
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the same code on a CPU, slowly
NOTHING = tl.constexpr(-1e30)


@triton.jit
def product(x, y, INTERPRET: tl.constexpr):
    """x @ y in float32, x rounded to y's type."""
    x = x.to(y.dtype)
    if INTERPRET:  # whose products of bfloat16 are wrong
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y, input_precision="tf32x3")  # of float32: on tensor cores, to about 1e-6


@triton.jit
def rows(x, t, d, stride, T, D):
    """Rows t of x (T, D), and zeros beyond it: (len(t), len(d))."""
    return tl.load(x + t.to(tl.int64)[:, None] * stride + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def entries(x, t, T, other):
    return tl.load(x + t, mask=t < T, other=other)


@triton.jit
def moved(x, n):
    """The pointer x, n further; None stays None."""
    if x is None:
        return x
    else:
        return x + n


@triton.jit
def queries_c(decay, i, first, T):
    """c_i of a tile's queries and that of the first one, float64; zeros without decay."""
    if decay is None:
        return tl.zeros_like(i).to(tl.float64), 0.0
    else:
        return entries(decay, i, T, 0.0), tl.load(decay + first)


@triton.jit
def scores(a, b, i, j, c, c_first, decay, bias, sharpness, T, DIAGONAL: tl.constexpr):
    """s of a tile of queries i with lambdas a and keys j with lambdas b. Off the diagonal c_i - c_first and c_first - c_j are
    both <= 0, so that float32 is fine for each; on it they are not, and a mask is needed."""
    w = tl.zeros_like(b)
    if bias is not None:
        w += entries(bias, j, T, 0.0).to(tl.float32)
    if decay is not None:
        c_j = entries(decay, j, T, 0.0)
        if not DIAGONAL:
            w += (c_first - c_j).to(tl.float32)
    s = w[None, :] - tl.abs(a[:, None] - b[None, :]) * sharpness
    if decay is not None:
        if DIAGONAL:
            s += (c[:, None] - c_j[None, :]).to(tl.float32)
        else:
            s += (c - c_first).to(tl.float32)[:, None]
    if DIAGONAL:
        s = tl.where(i[:, None] >= j[None, :], s, float("-inf"))
    return s


@triton.jit
def first_key(decay, oldest, first, T, N: tl.constexpr):
    """The first key of the first tile for a tile of queries."""
    if decay is None:
        return 0
    else:
        return tl.load(oldest + first) // N * N


@triton.jit
def forward_tile(start, greatest, Z, total, a, i, d, c, c_first, lambda_k, v, decay, bias, v_t, sharpness, T, D,
                 DIAGONAL: tl.constexpr, INTERPRET: tl.constexpr, N: tl.constexpr):
    j = start + tl.arange(0, N)
    s = scores(a, entries(lambda_k, j, T, 0.0), i, j, c, c_first, decay, bias, sharpness, T, DIAGONAL)
    higher = tl.maximum(greatest, tl.max(s, 1))
    P = tl.exp(s - higher[:, None])
    down = tl.exp(greatest - higher)
    total = total * down[:, None] + product(P, rows(v, j, d, v_t, T, D), INTERPRET)
    return higher, Z * down + tl.sum(P, 1), total


def forward_kernel(lambda_q, lambda_k, v, temperature, decay, bias, oldest, out, lse, v_b, v_h, v_t, out_b, out_h, out_t,
                   H, GROUP, T, D, WIDTH: tl.constexpr, INTERPRET: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # those with the most keys begin
    head = tl.program_id(0).to(tl.int64)
    b, h, kv = head // H, head % H, head // GROUP
    v, lambda_k, bias = v + b * v_b + h // GROUP * v_h, lambda_k + kv * T, moved(bias, kv * T)
    decay, oldest = moved(decay, head * T), moved(oldest, head * T)
    i, d = first + tl.arange(0, M), tl.arange(0, WIDTH)
    a, sharpness = entries(lambda_q + head * T, i, T, 0.0), 1 / tl.load(temperature + h).to(tl.float32)
    c, c_first = queries_c(decay, i, first, T)

    greatest = tl.full([M], NOTHING, tl.float32)
    Z = tl.zeros([M], tl.float32)
    total = tl.zeros([M, WIDTH], tl.float32)
    for start in range(first_key(decay, oldest, first, T, N), first // N * N, N):
        greatest, Z, total = forward_tile(start, greatest, Z, total, a, i, d, c, c_first, lambda_k, v, decay, bias, v_t, sharpness, T, D,
                                          False, INTERPRET, N)
    for start in range(first // N * N, tl.minimum(first + M, T), N):
        greatest, Z, total = forward_tile(start, greatest, Z, total, a, i, d, c, c_first, lambda_k, v, decay, bias, v_t, sharpness, T, D,
                                          True, INTERPRET, N)
    tl.store(out + b * out_b + h * out_h + i.to(tl.int64)[:, None] * out_t + d[None, :], total / Z[:, None],
             mask=(i < T)[:, None] & (d < D)[None, :])
    tl.store(lse + head * T + i, greatest + tl.log(Z), mask=i < T)


@triton.jit
def query_tile(start, r, da, dt, Pa, Pt, a, i, d, c, c_first, log_Z, delta_i, dout, lambda_k, v, decay, bias, v_t, sharpness, T, D,
               DIAGONAL: tl.constexpr, INTERPRET: tl.constexpr, N: tl.constexpr):
    j = start + tl.arange(0, N)
    key = entries(lambda_k, j, T, 0.0)
    P = tl.exp(scores(a, key, i, j, c, c_first, decay, bias, sharpness, T, DIAGONAL) - log_Z[:, None])
    dP = product(dout, tl.trans(rows(v, j, d, v_t, T, D)), INTERPRET)
    dS = P * (dP - delta_i[:, None])
    distance = a[:, None] - key[None, :]
    return (r + tl.sum(dS, 1), da - tl.sum(tl.where(distance >= 0, dS, -dS), 1), dt + tl.sum(dS * tl.abs(distance), 1),
            Pa - tl.sum(tl.where(distance >= 0, P, -P), 1), Pt + tl.sum(P * tl.abs(distance), 1))


def query_kernel(lambda_q, lambda_k, v, temperature, decay, bias, oldest, out, lse, grad, delta, grad_q, moment,
                 v_b, v_h, v_t, out_b, out_h, out_t, grad_b, grad_h, grad_t,
                 H, GROUP, T, D, WIDTH: tl.constexpr, INTERPRET: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """delta, the gradient of lambda_q, and each query's share of the temperature's."""
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    head = tl.program_id(0).to(tl.int64)
    b, h, kv = head // H, head % H, head // GROUP
    v, lambda_k, bias = v + b * v_b + h // GROUP * v_h, lambda_k + kv * T, moved(bias, kv * T)
    decay, oldest = moved(decay, head * T), moved(oldest, head * T)
    i, d = first + tl.arange(0, M), tl.arange(0, WIDTH)
    a, sharpness = entries(lambda_q + head * T, i, T, 0.0), 1 / tl.load(temperature + h).to(tl.float32)
    c, c_first = queries_c(decay, i, first, T)
    log_Z = entries(lse + head * T, i, T, float("inf")).to(tl.float32)
    dout = rows(grad + b * grad_b + h * grad_h, i, d, grad_t, T, D)
    delta_i = tl.sum(dout.to(tl.float32) * rows(out + b * out_b + h * out_h, i, d, out_t, T, D).to(tl.float32), 1)

    zero = tl.zeros([M], tl.float32)
    r, da, dt, Pa, Pt = zero, zero, zero, zero, zero
    for start in range(first_key(decay, oldest, first, T, N), first // N * N, N):
        r, da, dt, Pa, Pt = query_tile(start, r, da, dt, Pa, Pt, a, i, d, c, c_first, log_Z, delta_i, dout, lambda_k, v, decay, bias,
                                       v_t, sharpness, T, D, False, INTERPRET, N)
    for start in range(first // N * N, tl.minimum(first + M, T), N):
        r, da, dt, Pa, Pt = query_tile(start, r, da, dt, Pa, Pt, a, i, d, c, c_first, log_Z, delta_i, dout, lambda_k, v, decay, bias,
                                       v_t, sharpness, T, D, True, INTERPRET, N)
    tl.store(delta + head * T + i, delta_i + r, mask=i < T)
    tl.store(grad_q + head * T + i, (da - r * Pa) * sharpness, mask=i < T)
    tl.store(moment + head * T + i, (dt - r * Pt) * sharpness * sharpness, mask=i < T)


@triton.jit
def key_tile(first, dV, dw, signed, key, values, j, d, lambda_q, lse, delta, grad, decay, bias, grad_t, sharpness, T, D,
             DIAGONAL: tl.constexpr, INTERPRET: tl.constexpr, M: tl.constexpr):
    i = first + tl.arange(0, M)
    a = entries(lambda_q, i, T, 0.0)
    c, c_first = queries_c(decay, i, first, T)
    log_Z = entries(lse, i, T, float("inf")).to(tl.float32)
    P = tl.exp(scores(a, key, i, j, c, c_first, decay, bias, sharpness, T, DIAGONAL) - log_Z[:, None])
    dout = rows(grad, i, d, grad_t, T, D)
    dV += product(tl.trans(P), dout, INTERPRET)
    dS = P * (product(dout, tl.trans(values), INTERPRET) - entries(delta, i, T, 0.0)[:, None])
    return dV, dw + tl.sum(dS, 0), signed + tl.sum(tl.where(a[:, None] >= key[None, :], dS, -dS), 0)


def key_kernel(lambda_q, lambda_k, v, temperature, decay, bias, newest, lse, grad, delta, grad_k, grad_v, grad_weight,
               v_b, v_h, v_t, grad_b, grad_h, grad_t, grad_v_b, grad_v_h, grad_v_t,
               H, GROUP, T, D, WIDTH: tl.constexpr, INTERPRET: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The gradients of lambda_k, v and, for each query head, of the keys' weights."""
    start = tl.program_id(1) * N
    kv = tl.program_id(0).to(tl.int64)
    b, hk = kv // (H // GROUP), kv % (H // GROUP)
    j, d = start + tl.arange(0, N), tl.arange(0, WIDTH)
    key = entries(lambda_k + kv * T, j, T, 0.0)
    values = rows(v + b * v_b + hk * v_h, j, d, v_t, T, D)
    if bias is not None:
        bias += kv * T
    past = tl.cdiv(start + N, M) * M  # from this query on no tile meets the diagonal

    db = tl.zeros([N], tl.float32)
    dV = tl.zeros([N, WIDTH], tl.float32)
    for h in range(hk * GROUP, (hk + 1) * GROUP):
        head = b * H + h
        sharpness = 1 / tl.load(temperature + h).to(tl.float32)
        dw = tl.zeros([N], tl.float32)
        signed = tl.zeros([N], tl.float32)
        own, end = decay, T
        if decay is not None:
            own = decay + head * T
            end = tl.load(newest + head * T + tl.minimum(start + N, T) - 1) + 1
        for first in range(start // M * M, tl.minimum(past, end), M):
            dV, dw, signed = key_tile(first, dV, dw, signed, key, values, j, d, lambda_q + head * T, lse + head * T, delta + head * T,
                                      grad + b * grad_b + h * grad_h, own, bias, grad_t, sharpness, T, D, True, INTERPRET, M)
        for first in range(past, end, M):
            dV, dw, signed = key_tile(first, dV, dw, signed, key, values, j, d, lambda_q + head * T, lse + head * T, delta + head * T,
                                      grad + b * grad_b + h * grad_h, own, bias, grad_t, sharpness, T, D, False, INTERPRET, M)
        db += signed * sharpness
        tl.store(grad_weight + head * T + j, dw, mask=j < T)
    tl.store(grad_k + kv * T + j, db, mask=j < T)
    tl.store(grad_v + b * grad_v_b + hk * grad_v_h + j.to(tl.int64)[:, None] * grad_v_t + d[None, :], dV,
             mask=(j < T)[:, None] & (d < D)[None, :])


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


def level_kernel(x, w, order, values, weight, total, diff, scale, new_scale, half, pairs, GROUP, E, sign,
                 BACKWARD: tl.constexpr, INTERPRET: tl.constexpr, C: tl.constexpr, COLS: tl.constexpr):
    """One level of the tree (attention.Tree), upwards: sources and receivers of a pair of halves in the order of their positions x,
    C at a time. From chunk to chunk goes one state, the sum of all sources so far in the scale exp(held), which decays by the
    distance between the chunks' first items. Inside a chunk the weights of sources in the sums of items are a matrix:

        u_s = w_s + x_s,   reach_r = max of held and u_s, s <= r
        sum_r = sum_{s<=r} exp(u_s - reach_r) v_s + exp(held - reach_r) state      times exp(reach_r - x_r)

    Receivers take up their sum. A program has COLS columns of one pair."""
    pair = tl.program_id(0).to(tl.int64)
    n, begin = pair // pairs, pair % pairs * 2 * half
    d, c = tl.program_id(1) * COLS + tl.arange(0, COLS), tl.arange(0, C)
    padded = pairs * 2 * half
    x += pair * 2 * half
    w += pair * 2 * half
    order += pair * 2 * half
    values += (n // GROUP * padded + begin) * E
    total += (n * padded + begin) * E
    diff += (n * padded + begin) * E
    weight += n * padded + begin
    scale += n * padded + begin
    new_scale += n * padded + begin
    before = tl.load(x)
    held = before * 0 + NOTHING
    state = tl.zeros([COLS], tl.float32)
    for start in range(0, 2 * half, C):
        m = start + c
        there = m < 2 * half
        first = tl.load(x + start)
        held -= first - before
        before = first
        ahead = tl.load(x + m, mask=there, other=0.0) - first
        t = tl.load(order + m, mask=there, other=0)
        u = tl.load(w + m, mask=there, other=NOTHING) + tl.where(there, ahead, 0.0)
        reach = tl.maximum(tl.associative_scan(u, 0, maximum), held)
        A = tl.exp(tl.where(c[None, :] <= c[:, None], u[None, :] - reach[:, None], NOTHING).to(tl.float32))
        inside = there[:, None] & (d < E)[None, :]
        place = t[:, None] * E + d[None, :]
        summed = product(A, tl.load(values + place, mask=inside, other=0.0), INTERPRET)
        summed += tl.exp((held - reach).to(tl.float32))[:, None] * state[None, :]
        receives = there & ((t >= half) != BACKWARD)
        old = tl.load(scale + t, mask=receives, other=0.0)
        reached = reach - ahead + tl.load(weight + t, mask=receives, other=0.0)
        new = tl.maximum(old, reached)
        kept, added = tl.exp((old - new).to(tl.float32))[:, None], tl.exp((reached - new).to(tl.float32))[:, None] * summed
        inside = receives[:, None] & (d < E)[None, :]
        tl.store(total + place, tl.load(total + place, mask=inside, other=0.0) * kept + added, mask=inside)
        tl.store(diff + place, tl.load(diff + place, mask=inside, other=0.0) * kept + sign * added, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(new_scale + t, new, mask=receives)
        state = tl.sum(tl.where(c[:, None] == C - 1, summed, 0.0), 0)
        held = tl.max(reach, 0)


# (M, N, warps, stages) to choose from, on the first inputs of each head size and type
FORWARD_TILES = [(128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)]
BACKWARD_TILES = [(64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)]
INTERPRETED_TILE = {"M": 64, "N": 64}
LEVEL_TILE = (64, 32, 4, 2)  # items of a chunk, columns, warps, stages


def launcher(function, tiles):
    kernel = triton.jit(function)
    if INTERPRETED:  # autotuning needs a device
        return lambda grid, *args: kernel[grid(INTERPRETED_TILE)](*args, True, **INTERPRETED_TILE)
    tuned = triton.autotune([triton.Config({"M": M, "N": N}, num_warps=warps, num_stages=stages) for M, N, warps, stages in tiles],
                            key=["WIDTH"])(kernel)
    return lambda grid, *args: tuned[grid](*args, False)


KERNELS = {forward_kernel: FORWARD_TILES, query_kernel: BACKWARD_TILES, key_kernel: BACKWARD_TILES}
launch = {function: launcher(function, tiles) for function, tiles in KERNELS.items()}
launch_level = triton.jit(level_kernel)


def level(xs, ws, rows, head, xr, wr, total, diff, scale, half, C, backward):
    """attention.Tree.level, as a walk over the merged order of sources and receivers: upwards, and upwards from the other end."""
    N, E, (items, columns, warps, stages) = len(xs), rows.shape[-1], LEVEL_TILE
    halves = lambda left, right: torch.cat([left.view(N, -1, 2, half)[:, :, 0], right.view(N, -1, 2, half)[:, :, 1]], -1)
    nothing = torch.full_like(xs, NOTHING.value)
    x, order = halves(*((xr, xs) if backward else (xs, xr))).sort(stable=True)  # a tie counts as a key below the query
    w = halves(*((nothing, ws) if backward else (ws, nothing))).gather(-1, order)
    pairs = x.size(1)
    for up in (True, False):
        new_scale = scale.clone()
        launch_level[N * pairs, triton.cdiv(E, columns)](
            x, w, order, rows, wr, total, diff, scale, new_scale, half, pairs, N * xs.size(1) // len(rows), E,
            1.0 if up != backward else -1.0, backward, INTERPRETED, items, columns, num_warps=warps, num_stages=stages)
        scale.copy_(new_scale)
        x, w, order = -x.flip(-1), w.flip(-1), order.flip(-1)


def width(D):
    return max(16, triton.next_power_of_2(D))


def strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:3]]


def reaches(lambda_q, lambda_k, temperature, decay, bias):
    """(oldest, newest), each (B, H, T) int32: the first key that counts for a query, and the last query that a key counts for;
    None without decay. c never rises: what is beyond has a weight of exp(-NEGLIGIBLE) of the query's own key's at most, by a
    bound that is that of the head's farthest query for all."""
    if decay is None:
        return None, None
    group = lambda_q.size(1) // lambda_k.size(1)
    bias = torch.zeros_like(lambda_k) if bias is None else bias
    own = bias.repeat_interleave(group, 1) - (lambda_q - lambda_k.repeat_interleave(group, 1)).abs() / temperature[:, None]
    slack = NEGLIGIBLE + bias.amax(-1, keepdim=True).repeat_interleave(group, 1) - own.amin(-1, keepdim=True)
    return (torch.searchsorted(-decay, -decay - slack, out_int32=True),
            torch.searchsorted(-decay, slack - decay, right=True, out_int32=True) - 1)


def forward(lambda_q, lambda_k, v, temperature, decay, bias):
    """out (B, H, T, D) in v's type, lse (B, H, T) and two tensors of nothing, which other implementations save."""
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    out, lse = v.new_empty(B, T, H, D).transpose(1, 2), temperature.new_empty(B, H, T)
    oldest, _ = reaches(lambda_q, lambda_k, temperature, decay, bias)
    launch[forward_kernel](lambda tile: (B * H, triton.cdiv(T, tile["M"])), lambda_q, lambda_k, v, temperature, decay, bias, oldest,
                           out, lse, *strides(v, out), H, H // v.shape[1], T, D, width(D))
    return out, lse, v.new_empty(0), v.new_empty(0)


def backward(grad, lambda_q, lambda_k, v, temperature, decay, bias, out, lse, *_):
    (B, H, T), (Hkv, D) = lambda_q.shape, v.shape[1::2]
    delta, grad_q, moment = (torch.empty_like(lambda_q) for _ in range(3))
    grad_k, grad_v, grad_weight = torch.empty_like(lambda_k), v.new_empty(B, T, Hkv, D).transpose(1, 2), temperature.new_empty(B, H, T)
    oldest, newest = reaches(lambda_q, lambda_k, temperature, decay, bias)
    shared, sizes = (lambda_q, lambda_k, v, temperature, decay, bias), (H, H // Hkv, T, D, width(D))
    launch[query_kernel](lambda tile: (B * H, triton.cdiv(T, tile["M"])), *shared, oldest, out, lse, grad, delta, grad_q, moment,
                         *strides(v, out, grad), *sizes)
    launch[key_kernel](lambda tile: (B * Hkv, triton.cdiv(T, tile["N"])), *shared, newest, lse, grad, delta, grad_k, grad_v,
                       grad_weight, *strides(v, grad, grad_v), *sizes)
    return grad_q, grad_k, grad_v, moment.sum((0, 2)).to(temperature.dtype), grad_weight
