"""The operator on a GPU, in flash attention's tiles (Dao 2023), but without Q K^T and with hardly any exponentials.

In the notation of the paper and of attention.naive, for one head, with c the running sum of log_decay:

    P_ij = exp(-|lambda_q,i - lambda_k,j| / temperature + bias_j + c_i - c_j - lse_i)      j <= i,   sum_j P_ij = 1
    out  = P V
    dP   = dout V^T,   dS = P * (dP - delta),   delta_i = dout_i . out_i      the softmax's gradient
    dV   = P^T dout
    dlambda_q,i = -sum_j dS_ij sign_ij / temperature      sign_ij: the sign of lambda_q,i - lambda_k,j, + at a tie
    dlambda_k,j =  sum_i dS_ij sign_ij / temperature
    dtemperature = -(lambda_q . dlambda_q + lambda_k . dlambda_k) / temperature      for P depends on lambda / temperature only
    dweight_j    = sum_i dS_ij                            weight_j = bias_j - c_j; the gradient of c_i, sum_j dS_ij, is 0

One kernel computes all sums. Receivers sum up rows of sources: in the forward pass queries receive the rows (V_j, 1) of keys; in the
backward pass keys receive the rows (dout_i, -delta_i) of queries, which gives dV and, by a dot product with V, the sums of dS. The
sources on either side of a receiver x, sign + and sign -, are summed separately, because on one side each weight is the product of a
factor of the source y and one of the receiver:

    exp(-|x - y| / temperature) = exp((y - p) / temperature) * exp((p - x) / temperature)    for y <= x;  mirrored for y > x

So a tile of weights is a selection: the source's factor `up` where it is at or below the receiver and 0 elsewhere, and `down` where
it is above. The receiver's factors multiply the finished sums. p is the middle of the head's lambdas; factors do not overflow if
these span at most NEAR temperatures. If they span more, and on the diagonal of a head with decay, a tile takes the exponential of
each difference and rescales the sums whenever it finds a greater exponent (far_tile).

A tile is M receivers by N sources. Nothing of size T x T is kept: the forward pass saves lse, out and
spread_i = sum_j P_ij sign_ij (V_j - out_i), whose dot product with dout_i is -temperature times the gradient of lambda_q,i. Every sum
has one owner: no atomics, and the same tiles give the same bits. A tile takes two matrix products forward and two backward; flash
attention takes seven.

Sums are float32; matrix products take V's dtype. In bfloat16 the factors are rounded before anything is computed from them, so that
numerator and denominator agree. Tiles entirely in the future are skipped, and so are those in which every weight has decayed below
exp(-NEGLIGIBLE) times that of the query's own key (reaches()).

For long contexts there is attention_grid.py."""

import torch
import triton
import triton.language as tl

NEGLIGIBLE = 40
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the same code on a CPU, slowly
NOTHING = tl.constexpr(-1e30)
NEAR = tl.constexpr(32.0)  # temperatures: a factor is at most exp(16), times that of the bias:
NEAR_BIAS = tl.constexpr(11.0)  # exp(27) in all, far below the largest float32 and bfloat16, exp(88)


@triton.jit
def product(x, y, INTERPRET: tl.constexpr):
    """x @ y with float32 sums; x is rounded to y's dtype."""
    x = x.to(y.dtype)
    if INTERPRET:  # the interpreter's bfloat16 products are wrong
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y, input_precision="tf32x3")  # float32 inputs: on tensor cores, to about 1e-6


@triton.jit
def rows(x, t, d, stride, T, D: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """Rows t of x (T, D), padded with zeros to (len(t), WIDTH). ALL: every t is below T."""
    place = x + t.to(tl.int64)[:, None] * stride + d[None, :]
    if not ALL:
        return tl.load(place, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    elif D < WIDTH:
        return tl.load(place, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def entries(x, t, T, other):
    return tl.load(x + t, mask=t < T, other=other)


def key_kernel(
    lambda_q,
    lambda_k,
    v,
    temperature,
    bias,
    middle,
    factors,
    weight,
    H,
    GROUP,
    T,
    HALF: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes middle (B, H, 2), p and whether the head's lambdas are near one another; and a block of keys' factors and log weights."""
    head = tl.program_id(0).to(tl.int64)
    kv = head // GROUP
    lambda_q, lambda_k = lambda_q + head * T, lambda_k + kv * T
    if bias is not None:
        bias += kv * T
    sharpness = (1 / tl.load(temperature + head % H)).to(tl.float32)

    least = tl.full([BLOCK], float("inf"), tl.float32)
    greatest = -least
    greatest_bias = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.minimum(entries(lambda_q, t, T, float("inf")), entries(lambda_k, t, T, float("inf"))))
        greatest = tl.maximum(greatest, tl.maximum(entries(lambda_q, t, T, float("-inf")), entries(lambda_k, t, T, float("-inf"))))
        if bias is not None:
            greatest_bias = tl.maximum(greatest_bias, tl.abs(entries(bias, t, T, 0.0).to(tl.float32)))
    least, greatest = tl.min(least, 0), tl.max(greatest, 0)
    p = (least + greatest) * 0.5
    near = ((greatest - least) * sharpness <= NEAR) & (tl.max(greatest_bias, 0) <= NEAR_BIAS) & (not HALF)  # float16: 0 below 2^-24
    tl.store(middle + head * 2, p)
    tl.store(middle + head * 2 + 1, near.to(tl.float32))

    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = entries(lambda_k, t, T, 0.0)
    w = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        w = entries(bias, t, T, 0.0).to(tl.float32)
    store_factors(
        factors + head * tl.cdiv(T, PAD) * PAD * 4, weight + head * T, t, x, (x - p) * sharpness, w, w * 0 + 1, T, PAD, v.dtype.element_ty
    )


@triton.jit
def store_factors(factors, weight, t, x, away, w, one, T, PAD: tl.constexpr, TYPE: tl.constexpr):
    """Write what a tile needs of its sources, (padded, 4): x, up, down and the number that extends their row (1 or -delta); zeros
    from T on. The factors up and down are rounded as in the matrix product."""
    there, place = t < T, factors + t * 4
    inside = t < tl.cdiv(T, PAD) * PAD
    tl.store(place, x, mask=inside)
    tl.store(place + 1, tl.where(there, tl.exp(w + away), 0.0).to(TYPE).to(tl.float32), mask=inside)
    tl.store(place + 2, tl.where(there, tl.exp(w - away), 0.0).to(TYPE).to(tl.float32), mask=inside)
    tl.store(place + 3, tl.where(there, one, 0.0), mask=inside)
    tl.store(weight + t, w, mask=there)


def query_kernel(
    lambda_q,
    temperature,
    out,
    lse,
    spread,
    middle,
    grad,
    factors,
    weight,
    dout,
    grad_q,
    moment,
    out_b,
    out_h,
    out_t,
    grad_b,
    grad_h,
    grad_t,
    H,
    T,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    M: tl.constexpr,
):
    """Writes a block of queries' factors, log weights and rows, the gradient of lambda_q and its part of the temperature's."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    t, d = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    sharpness = (1 / tl.load(temperature + h)).to(tl.float32)
    padded = tl.cdiv(T, PAD) * PAD
    row = rows(grad + b * grad_b + h * grad_h, t, d, grad_t, T, D, WIDTH, False)
    tl.store(dout + (head * padded + t)[:, None] * D + d[None, :], row, mask=(t < padded)[:, None] & (d < D)[None, :])
    row = row.to(tl.float32)
    rounding = rows(spread + (tl.num_programs(0) + head) * T * D, t, d, D, T, D, WIDTH, False).to(tl.float32)
    delta = tl.sum(row * (rows(out + b * out_b + h * out_h, t, d, out_t, T, D, WIDTH, False).to(tl.float32) + rounding), 1)
    a = entries(lambda_q + head * T, t, T, 0.0)
    away = a - tl.load(middle + head * 2)
    da = -tl.sum(row * rows(spread + head * T * D, t, d, D, T, D, WIDTH, False).to(tl.float32), 1) * sharpness
    tl.store(grad_q + head * T + t, da, mask=t < T)
    tl.store(moment + head * T + t, -away * da * sharpness, mask=t < T)
    w = -entries(lse + head * T, t, T, 0.0).to(tl.float32)
    store_factors(factors + head * padded * 4, weight + head * T, t, a, -away * sharpness, w, -delta, T, PAD, dout.dtype.element_ty)


@triton.jit
def four(factors, s, N: tl.constexpr):
    """The columns x, up, down, one of factors (padded, 4) at the sources s, by one load of 16 bytes per source."""
    entry = tl.load(factors + s[:, None] * 4 + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(entry, [N, 2, 2]))
    x, down = tl.split(even)
    up, one = tl.split(odd)
    return x, up, down, one


@triton.jit
def near_tile(
    start,
    plus,
    minus,
    one_plus,
    one_minus,
    x,
    r,
    d,
    c_edge,
    factors,
    source,
    decay,
    source_t,
    T,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    INTERPRET: tl.constexpr,
    N: tl.constexpr,
):
    s = start + tl.arange(0, N)
    row = rows(source, s, d, source_t, T, D, WIDTH, BACKWARD or not DIAGONAL)
    y, up, down, one = four(factors, s, N)
    if decay is not None:
        c = entries(decay, s, T, 0.0)
        fade = tl.exp(tl.minimum(c - c_edge if BACKWARD else c_edge - c, 0.0).to(tl.float32))
        up, down = (up * fade).to(row.dtype).to(tl.float32), (down * fade).to(row.dtype).to(tl.float32)
    below = y[None, :] >= x[:, None] if BACKWARD else y[None, :] <= x[:, None]
    P_plus, P_minus = tl.where(below, up[None, :], 0.0), tl.where(below, 0.0, down[None, :])
    if DIAGONAL:
        seen = s[None, :] >= r[:, None] if BACKWARD else s[None, :] <= r[:, None]
        P_plus, P_minus = tl.where(seen, P_plus, 0.0), tl.where(seen, P_minus, 0.0)
    return add(plus, minus, one_plus, one_minus, P_plus, P_minus, row, one, BACKWARD, INTERPRET)


@triton.jit
def far_tile(
    start,
    plus,
    minus,
    one_plus,
    one_minus,
    scale,
    x,
    r,
    d,
    c_r,
    c_edge,
    sharpness,
    factors,
    weight,
    source,
    decay,
    source_t,
    T,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    INTERPRET: tl.constexpr,
    N: tl.constexpr,
):
    """The sums are in units of exp(scale). Off the diagonal the decay is the sum of two terms, split at c_edge, that are both <= 0, so
    that float32 suffices for each; on the diagonal they would not be, and a causal mask is needed."""
    s = start + tl.arange(0, N)
    row = rows(source, s, d, source_t, T, D, WIDTH, BACKWARD or not DIAGONAL)
    y, _, _, one = four(factors, s, N)
    distance = x[:, None] - y[None, :]
    e = entries(weight, s, T, float("-inf"))[None, :] - tl.abs(distance) * sharpness
    if decay is not None:
        c = entries(decay, s, T, 0.0)
        if DIAGONAL:
            lag = c_r[:, None] - c[None, :]
            e += (-lag if BACKWARD else lag).to(tl.float32)
        else:
            to_edge, from_edge = c_r - c_edge, c_edge - c
            e += (-to_edge if BACKWARD else to_edge).to(tl.float32)[:, None]
            e += (-from_edge if BACKWARD else from_edge).to(tl.float32)[None, :]
    if DIAGONAL:
        e = tl.where(s[None, :] >= r[:, None] if BACKWARD else s[None, :] <= r[:, None], e, float("-inf"))
    return add_far(plus, minus, one_plus, one_minus, scale, e, distance, row, one, BACKWARD, INTERPRET)


@triton.jit
def add(plus, minus, one_plus, one_minus, P_plus, P_minus, row, one, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr):
    """Add a tile's sums to the sums."""
    plus += product(P_plus, row, INTERPRET)
    minus += product(P_minus, row, INTERPRET)
    if BACKWARD:
        P_plus, P_minus = P_plus * one[None, :], P_minus * one[None, :]
    return plus, minus, one_plus + tl.sum(P_plus, 1), one_minus + tl.sum(P_minus, 1)


@triton.jit
def add_far(plus, minus, one_plus, one_minus, scale, e, distance, row, one, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr):
    """add() of weights exp(e), to sums in units of exp(scale), which a greater exponent rescales. distance: receivers less sources."""
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
        BACKWARD,
        INTERPRET,
    )
    return plus, minus, one_plus, one_minus, higher


@triton.jit
def with_sink(plus, minus, one_plus, one_minus, scale, sink):
    """The sums and their scale, rescaled to make room for the sink, a log weight; and Z, the sum of all weights with it."""
    sink = sink.to(scale.dtype)
    higher = tl.maximum(scale, sink)
    kept = tl.exp(scale - higher)
    plus, minus, one_plus, one_minus = plus * kept[:, None], minus * kept[:, None], one_plus * kept, one_minus * kept
    return plus, minus, one_plus, one_minus, higher, one_plus + one_minus + tl.exp(sink - higher)


@triton.jit
def store_gradients(plus, minus, one_plus, one_minus, scale, away, sharpness, v, out, grad_k, grad_weight, moment, head, r, d, v_t, out_t,
                    T, D: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """What the backward pass writes of the keys r, whose lambdas are -away from the point that moments are taken about: dV to out."""
    unit = tl.exp(scale)
    total, diff = (plus + minus) * unit[:, None], (plus - minus) * unit[:, None]
    tl.store(out + r.to(tl.int64)[:, None] * out_t + d[None, :], total, mask=(r < T)[:, None] & (d < D)[None, :])
    value = rows(v, r, d, v_t, T, D, WIDTH, False).to(tl.float32)
    db = (tl.sum(diff * value, 1) + (one_plus - one_minus) * unit) * sharpness
    tl.store(grad_k + head * T + r, db, mask=r < T)
    tl.store(grad_weight + head * T + r, tl.sum(total * value, 1) + (one_plus + one_minus) * unit, mask=r < T)
    tl.store(moment + head * T + r, away * db * sharpness, mask=r < T)


@triton.jit
def store_values(plus, minus, one_plus, one_minus, scale, sink, out, spread, lse, head, h, r, d, out_t, T, D: tl.constexpr):
    """What the forward pass writes of the queries r."""
    Z = one_plus + one_minus
    if sink is not None:
        plus, minus, one_plus, one_minus, scale, Z = with_sink(plus, minus, one_plus, one_minus, scale, tl.load(sink + h))
    inside, r64 = (r < T)[:, None] & (d < D)[None, :], r.to(tl.int64)
    total = (plus + minus) / Z[:, None]
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + r64[:, None] * out_t + d[None, :], rounded, mask=inside)
    place = spread + (head * T + r64)[:, None] * D + d[None, :]
    tl.store(place, (plus - minus) / Z[:, None] - ((one_plus - one_minus) / Z)[:, None] * total, mask=inside)
    tl.store(place + tl.num_programs(0).to(tl.int64) * T * D, total - rounded.to(tl.float32), mask=inside)
    tl.store(lse + head * T + r, scale + tl.log(Z), mask=r < T)


def sums_kernel(
    receiver_x,
    source,
    v,
    temperature,
    decay,
    bias,
    reach,
    middle,
    factors,
    weight,
    out,
    lse,
    spread,
    grad_k,
    grad_weight,
    moment,
    sink,
    source_b,
    source_h,
    source_t,
    v_b,
    v_h,
    v_t,
    out_b,
    out_h,
    out_t,
    H,
    GROUP,
    T,
    TUNED,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    INTERPRET: tl.constexpr,
    BACKWARD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    tile = tl.program_id(1)
    first = (tile if BACKWARD else tl.num_programs(1) - 1 - tile) * M  # tiles with the most sources start first
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    kv = b * (H // GROUP) + h // GROUP
    receiver_x += (kv if BACKWARD else head) * T
    source += b * source_b + (h if BACKWARD else h // GROUP) * source_h
    factors, weight = factors + head * tl.cdiv(T, PAD) * PAD * 4, weight + head * T
    if bias is not None:
        bias += kv * T
    r, d = first + tl.arange(0, M), tl.arange(0, WIDTH)
    x, p = entries(receiver_x, r, T, 0.0), tl.load(middle + head * 2)
    if not INTERPRET:  # adds 0: gives x the layout of a product, so that the weights are computed where the next product needs them
        x += tl.sum(tl.dot(tl.zeros([M, 16], source.dtype.element_ty), tl.zeros([16, WIDTH], source.dtype.element_ty)), 1)
    sharpness = (1 / tl.load(temperature + h)).to(tl.float32)
    last = tl.minimum(first + M, T)
    diagonal, past = first // N * N, last if not BACKWARD else tl.cdiv(first + M, N) * N  # where it begins and ends
    begin, end = (past, T) if BACKWARD else (0, diagonal)
    c_r, c_edge = 0.0, 0.0
    if decay is not None:
        decay, reach = decay + head * T, reach + head * T
        c_r = entries(decay, r, T, 0.0)
        if BACKWARD:
            c_edge, end = tl.load(decay + last - 1), tl.load(reach + last - 1) + 1
        else:
            c_edge, begin = tl.load(decay + first), tl.load(reach + first) // N * N

    plus = tl.zeros([M, WIDTH], tl.float32)
    minus = tl.zeros([M, WIDTH], tl.float32)
    one_plus = tl.zeros([M], tl.float32)
    one_minus = tl.zeros([M], tl.float32)
    scale = tl.full([M], NOTHING, tl.float32)
    if tl.load(middle + head * 2 + 1) > 0:
        for start in range(begin, end, N):
            plus, minus, one_plus, one_minus = near_tile(
                start,
                plus,
                minus,
                one_plus,
                one_minus,
                x,
                r,
                d,
                c_edge,
                factors,
                source,
                decay,
                source_t,
                T,
                D,
                WIDTH,
                False,
                BACKWARD,
                INTERPRET,
                N,
            )
        if decay is None:
            for start in range(diagonal, tl.minimum(past, T), N):
                plus, minus, one_plus, one_minus = near_tile(
                    start,
                    plus,
                    minus,
                    one_plus,
                    one_minus,
                    x,
                    r,
                    d,
                    c_edge,
                    factors,
                    source,
                    decay,
                    source_t,
                    T,
                    D,
                    WIDTH,
                    True,
                    BACKWARD,
                    INTERPRET,
                    N,
                )
        away = (p - x if BACKWARD else x - p) * sharpness
        receiver_plus, receiver_minus = tl.exp(-away), tl.exp(away)
        plus, minus = plus * receiver_plus[:, None], minus * receiver_minus[:, None]
        one_plus, one_minus = one_plus * receiver_plus, one_minus * receiver_minus
        scale = tl.zeros([M], tl.float32)
        if decay is not None:
            scale += (c_edge - c_r if BACKWARD else c_r - c_edge).to(tl.float32)
    else:
        for start in range(begin, end, N):
            plus, minus, one_plus, one_minus, scale = far_tile(
                start,
                plus,
                minus,
                one_plus,
                one_minus,
                scale,
                x,
                r,
                d,
                c_r,
                c_edge,
                sharpness,
                factors,
                weight,
                source,
                decay,
                source_t,
                T,
                D,
                WIDTH,
                False,
                BACKWARD,
                INTERPRET,
                N,
            )
        if decay is None:
            for start in range(diagonal, tl.minimum(past, T), N):
                plus, minus, one_plus, one_minus, scale = far_tile(
                    start,
                    plus,
                    minus,
                    one_plus,
                    one_minus,
                    scale,
                    x,
                    r,
                    d,
                    c_r,
                    c_edge,
                    sharpness,
                    factors,
                    weight,
                    source,
                    decay,
                    source_t,
                    T,
                    D,
                    WIDTH,
                    True,
                    BACKWARD,
                    INTERPRET,
                    N,
                )
    if decay is not None:
        for start in range(diagonal, tl.minimum(past, end if BACKWARD else T), N):
            plus, minus, one_plus, one_minus, scale = far_tile(
                start,
                plus,
                minus,
                one_plus,
                one_minus,
                scale,
                x,
                r,
                d,
                c_r,
                c_edge,
                sharpness,
                factors,
                weight,
                source,
                decay,
                source_t,
                T,
                D,
                WIDTH,
                True,
                BACKWARD,
                INTERPRET,
                N,
            )

    out += b * out_b + h * out_h
    if BACKWARD:
        if bias is not None:
            scale += entries(bias, r, T, 0.0).to(tl.float32)
        v += b * v_b + h // GROUP * v_h
        store_gradients(plus, minus, one_plus, one_minus, scale, p - x, sharpness, v, out, grad_k, grad_weight, moment, head, r, d, v_t,
                        out_t, T, D, WIDTH)  # fmt: skip
    else:
        store_values(plus, minus, one_plus, one_minus, scale, sink, out, spread, lse, head, h, r, d, out_t, T, D)


# (M, N, warps, stages, most registers per thread): autotuning picks one for each pass, head size, dtype and tuned_for(T) it meets
TILES = [(64, 32, 4, 3, 168), (64, 64, 4, 3, None), (128, 64, 8, 3, None), (64, 32, 8, 3, None), (32, 32, 4, 2, None)]
INTERPRETED_TILE = {"M": 64, "N": 64}
KEYS_BLOCK, QUERIES_BLOCK = 1024, 32
PAD = 128  # the number of sources is padded to a multiple of this, which is a multiple of every N


def one_if_deterministic(configs, *_, **__):
    """Of the tiles of a kernel those that autotuning may choose from. The tile decides in which order sums are made: where the same bits
    are asked for every time, the first is taken, whatever the others' times are."""
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs


def short_bench(call, quantiles):
    """As autotuning's own measurement, in a fifth of its time."""
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def tuned(kernel, configs, key, **options):
    """The jitted kernel, a grid and its arguments given, with the fastest of configs for each value of the arguments `key` and the
    dtypes of all. It is looked up here, because autotuning's own look-up takes longer than a launch."""
    prune = {"early_config_prune": one_if_deterministic}
    tuner = triton.autotune(configs, key=key, prune_configs_by=prune, do_bench=short_bench, **options)(kernel)
    places, fastest = [kernel.arg_names.index(name) for name in key], {}

    def launch(grid, *args):
        case = *(args[place] for place in places), *(getattr(x, "dtype", None) for x in args)
        if case in fastest:
            kernel[grid](*args, **fastest[case])
        else:
            tuner[grid](*args)
            fastest[case] = tuner.best_config.all_kwargs()

    launch.tuner = tuner
    return launch


def launcher():
    kernel = triton.jit(sums_kernel)
    if INTERPRETED:  # autotuning needs a device
        return lambda grid, *args: kernel[grid(INTERPRETED_TILE)](*args, **INTERPRETED_TILE)
    configs = [
        triton.Config({"M": M, "N": N}, num_warps=warps, num_stages=stages, maxnreg=registers) for M, N, warps, stages, registers in TILES
    ]
    return tuned(kernel, configs, ["WIDTH", "BACKWARD", "TUNED"])


launch_keys, launch_queries, launch_sums = triton.jit(key_kernel), triton.jit(query_kernel), launcher()


def cdiv(n, size):
    """How many blocks of `size` it takes for n. (triton.cdiv, which is for kernels, takes microseconds here.)"""
    return -(-n // size)


def width(D):
    return max(16, 1 << (D - 1).bit_length())


def padded(T):
    return cdiv(T, PAD) * PAD


def tuned_for(T):
    """Lengths with the same value share their tiles."""
    return min(max(1 << (T - 1).bit_length(), 256), 8192)


def strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:3]]


def reaches(lambda_q, lambda_k, temperature, decay, bias):
    """(oldest, newest), each (B, H, T) int32: the first key that counts for each query, and the last query for which each key
    counts; (None, None) without decay. Since c never rises, any weight beyond them is at most exp(-NEGLIGIBLE) times that of the
    query's own key; the bound is the same for all queries of a head, that of the worst one."""
    if decay is None:
        return None, None
    group = lambda_q.size(1) // lambda_k.size(1)
    bias = torch.zeros_like(lambda_k) if bias is None else bias
    own = bias.repeat_interleave(group, 1) - (lambda_q - lambda_k.repeat_interleave(group, 1)).abs() / temperature[:, None]
    slack = NEGLIGIBLE + bias.amax(-1, keepdim=True).repeat_interleave(group, 1) - own.amin(-1, keepdim=True)
    return (
        torch.searchsorted(-decay, -decay - slack, out_int32=True),
        torch.searchsorted(-decay, slack - decay, right=True, out_int32=True) - 1,
    )


def forward(lambda_q, lambda_k, v, temperature, decay, bias, sink=None):
    """(out (B, H, T, D) in v's dtype, lse (B, H, T), (2, B, H, T, D): spread and the rounding error of out, middle (B, H, 2))."""
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    out, lse = v.new_empty(B, T, H, D).transpose(1, 2), temperature.new_empty(B, H, T)
    spread, middle = v.new_empty(2, B, H, T, D), lambda_q.new_empty(B, H, 2)
    factors, weight = lambda_q.new_empty(B, H, padded(T), 4), lambda_q.new_empty(B, H, T)
    launch_keys[B * H, cdiv(padded(T), KEYS_BLOCK)](
        lambda_q, lambda_k, v, temperature, bias, middle, factors, weight, H, H // v.shape[1], T, v.dtype is torch.float16, PAD, KEYS_BLOCK
    )
    oldest, _ = reaches(lambda_q, lambda_k, temperature, decay, bias)
    launch_sums(
        lambda tile: (B * H, cdiv(T, tile["M"])),
        lambda_q,
        v,
        v,
        temperature,
        decay,
        bias,
        oldest,
        middle,
        factors,
        weight,
        out,
        lse,
        spread,
        None,
        None,
        None,
        sink,
        *strides(v, v, out),
        H,
        H // v.shape[1],
        T,
        tuned_for(T),
        D,
        width(D),
        PAD,
        INTERPRETED,
        False,
    )
    return out, lse, spread, middle


def backward(grad, lambda_q, lambda_k, v, temperature, decay, bias, out, lse, spread, middle):
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    group = H // v.shape[1]
    factors, weight, moment = lambda_q.new_empty(B, H, padded(T), 4), lambda_q.new_empty(B, H, T), lambda_q.new_empty(2, B, H, T)
    grad_q, grad_k, grad_weight = torch.empty_like(lambda_q), torch.empty_like(lambda_q), temperature.new_empty(B, H, T)
    rows, grad_v = v.new_empty(B, H, padded(T), D), (v if group == 1 else lambda_q).new_empty(B, T, H, D).transpose(1, 2)
    launch_queries[B * H, padded(T) // QUERIES_BLOCK](
        lambda_q,
        temperature,
        out,
        lse,
        spread,
        middle,
        grad,
        factors,
        weight,
        rows,
        grad_q,
        moment[0],
        *strides(out, grad),
        H,
        T,
        D,
        width(D),
        PAD,
        QUERIES_BLOCK,
    )
    _, newest = reaches(lambda_q, lambda_k, temperature, decay, bias)
    launch_sums(
        lambda tile: (B * H, cdiv(T, tile["M"])),
        lambda_k,
        rows,
        v,
        temperature,
        decay,
        bias,
        newest,
        middle,
        factors,
        weight,
        grad_v,
        None,
        None,
        grad_k,
        grad_weight,
        moment[1],
        None,
        *strides(rows, v, grad_v),
        H,
        group,
        T,
        tuned_for(T),
        D,
        width(D),
        PAD,
        INTERPRETED,
        True,
    )
    if group > 1:
        grad_k = grad_k.unflatten(1, (-1, group)).sum(2)
        grad_v = grad_v.transpose(1, 2).unflatten(2, (-1, group)).sum(3).to(v.dtype).transpose(1, 2)
    return grad_q, grad_k, grad_v, moment.sum((0, 1, 3), dtype=temperature.dtype), grad_weight
