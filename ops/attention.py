"""The operator of tau attention: one scalar lambda per token and head takes the place of query and key vectors.

tau_attention() is what model.py calls, and naive() is its definition. Two implementations compute the same in O(T log T) time:
`walk` (attention.cpp, compiled at first use, CPU) and `tree` (plain torch, any device); docs/algorithm.md explains them. `triton`
(attention_triton.py) computes all pairs, in flash attention's tiles, in a GPU's on-chip memory; `grid` (attention_grid.py) computes
on a GPU what lies near in time or in lambda pair by pair, the rest by sums, in O(T sqrt(T)) time."""

import fcntl
import functools
import hashlib
import importlib.util
import logging
import math
import os
import platform
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from common import ROOT, first_line, note

IMPLS = ("auto", "naive", "tree", "walk", "triton", "grid")
TRITON_WIDTH = 128  # the widest head of impl="triton"
GRID_FROM = 8192  # tokens of context from which a GPU with triton takes the grid: results/attention_cuda.json
LEAF = 32  # tree: blocks of at most this many tokens are summed directly, pair by pair
NOTHING = -1e30  # stands for log 0, the log of an empty sum


def tau_attention(lambda_q, lambda_k, v, temperature, log_decay=None, key_bias=None, impl="auto", sink=None):
    """Causal attention by the distance of scalars: out_i = sum_{j<=i} softmax_j(logit_ij) v_j, where

        logit_ij = -|lambda_q,i - lambda_k,j| / temperature  +  key_bias_j  +  sum of log_decay over j+1 .. i

    (Topological Transformer, 2026, section "taumode attention"; the last two terms are zero in the published form.)

    lambda_q     (B, H, Tq)        bounded energies of the queries, the last Tq of the T positions; Tq = T in training
    lambda_k     (B, Hkv, T)       of the keys; H is a multiple of Hkv, query head h reads key head h // (H/Hkv)
    v            (B, Hkv, T, D)    values
    temperature  number > 0 or (H,)
    log_decay    (B, H, T) or (H,), <= 0: what each step costs; (H,) is the same at every token
    key_bias     (B, Hkv, T): added to all logits of a key
    impl         "naive": dense, O(T^2) time and memory. "walk": compiled, CPU; "tree": plain torch; both exact, O(T log T)
                 time and O(T D) memory. "triton": GPU, D <= 128, O(T^2) time and O(T D) memory; "grid": the same in O(T sqrt(T))
                 time. These four need Tq = T.
                 "auto": the fastest that applies.
    sink         (H,): the logit of one more key, whose value is 0 and which all queries see; -inf is none

    Returns (B, H, Tq, D) in v's dtype, computed in float32 (float64 if v is float64), under autocast too; triton multiplies
    weights and values in v's dtype and sums in float32. Differentiable in every tensor argument. Raises ValueError for
    shapes that do not fit, for a temperature that is a number but not positive, for an impl that is unknown or does not
    apply, and, in autograd's anomaly mode, for inputs that are not finite.
    """
    given = dict(lambda_q=lambda_q, lambda_k=lambda_k, v=v, temperature=temperature, log_decay=log_decay, key_bias=key_bias, sink=sink)
    given = {name: x for name, x in given.items() if torch.is_tensor(x)}
    if not shapes_fit(**given):
        raise ValueError("shapes do not fit: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items()))
    (B, H, Tq), (T, D) = lambda_q.shape, v.shape[2:]
    if not torch.is_tensor(temperature) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        for name, x in given.items():
            if not x.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: one of {', '.join(IMPLS)}")
    if impl == "auto":
        device = v.device.type if D <= TRITON_WIDTH and v.dtype is not torch.float64 else f"{v.device.type}, wide"
        impl = "naive" if Tq < T else fastest(device, "short" if T < 256 else "long" if T >= long_from(device) else "medium")
    elif impl in ("triton", "grid"):
        check_triton(v, impl)
    if impl != "naive" and Tq < T:
        raise ValueError(f"impl={impl!r} needs a query for every key, not {Tq} for {T}")
    with torch.autocast(v.device.type, enabled=False):
        slope = log_decay is not None and log_decay.ndim == 1
        double = v.dtype is torch.float64 or slope and impl == "walk"  # a slope's gradient sums over T^2 / 2 lags
        dtype = torch.float64 if double else torch.float32
        half = impl in ("triton", "grid") and v.dtype in (torch.bfloat16, torch.float16)
        inputs = [lambda_q.to(dtype), lambda_k.to(dtype), v if half else v.to(dtype)]
        if impl == "naive":
            return naive(*inputs, temperature, log_decay, key_bias, sink).to(v.dtype)
        scalar = finest(v.device)  # dtype of positions and log weights
        if not torch.is_tensor(temperature):
            temperature = torch.full((H,), temperature, dtype=scalar, device=v.device)
        temperature = temperature.to(v.device, scalar).expand(H)
        if log_decay is not None:
            log_decay = (log_decay if log_decay.ndim == 3 else log_decay[:, None].expand(B, H, T)).to(scalar)
            log_decay = running_sum(log_decay)
        if key_bias is not None:
            key_bias = key_bias.to(scalar)
        if sink is not None:
            sink = sink.to(scalar)
        return fast_attention(*inputs, temperature, log_decay, key_bias, sink, impl)[0].to(v.dtype)


def shapes_fit(lambda_q, lambda_k, v, temperature=None, log_decay=None, key_bias=None, sink=None):
    """Whether the tensors that are given have the shapes that tau_attention() requires."""
    if lambda_q.ndim != 3 or v.ndim != 4:
        return False
    (B, H, Tq), (Hkv, T) = lambda_q.shape, v.shape[1:3]
    return (
        lambda_k.shape == (B, Hkv, T)
        and len(v) == B
        and H % Hkv == 0
        and Tq <= T
        and (temperature is None or temperature.shape in ((), (H,)))
        and (log_decay is None or log_decay.shape in ((B, H, T), (H,)))
        and (key_bias is None or key_bias.shape == (B, Hkv, T))
        and (sink is None or sink.shape == (H,))
    )


def finest(device):
    """The most precise float dtype that a device supports."""
    return torch.float32 if device.type == "mps" else torch.float64


def running_sum(x):
    """x.cumsum(-1), for which torch has no deterministic algorithm on CUDA."""
    return doubled_sum(x) if x.is_cuda and torch.are_deterministic_algorithms_enabled() else x.cumsum(-1)


def doubled_sum(x):
    """x.cumsum(-1), in log2(T) steps: in step n each entry has taken in 2^n and gets the 2^n before them."""
    step = 1
    while step < x.size(-1):
        x = torch.cat([x[..., :step], x[..., step:] + x[..., :-step]], -1)
        step *= 2
    return x


def naive(lambda_q, lambda_k, v, temperature, log_decay=None, key_bias=None, sink=None):
    """The reference: the definition of tau_attention, line by line. Dense; arguments and shapes are the same, dtypes are kept."""
    weights = attention_weights(lambda_q, lambda_k, temperature, log_decay, key_bias, sink)
    out = weights.unflatten(1, (v.shape[1], -1)).flatten(2, 3) @ v  # (B, Hkv, group * Tq, D)
    return out.view(*lambda_q.shape, v.shape[-1])


def attention_weights(lambda_q, lambda_k, temperature, log_decay=None, key_bias=None, sink=None):
    """The softmax weights of tau_attention, (B, H, Tq, T); what is lacking to a sum of 1 is the sink's."""
    B, H, Tq = lambda_q.shape
    Hkv, T = lambda_k.shape[1:]
    group = H // Hkv

    distance = (lambda_q.view(B, Hkv, group, Tq, 1) - lambda_k.view(B, Hkv, 1, 1, T)).abs()  # (B, Hkv, group, Tq, T)
    if torch.is_tensor(temperature) and temperature.ndim:
        temperature = temperature.to(distance.dtype).view(Hkv, group, 1, 1)
    logits = -distance / temperature
    logits = add_terms(logits.flatten(1, 2), log_decay, key_bias)
    if sink is not None:
        logits = torch.cat([logits, sink.to(logits.dtype)[:, None, None].expand(B, H, Tq, 1)], -1)
    return logits.softmax(-1)[..., :T]


def add_terms(logits, log_decay, key_bias):
    """logits (B or 1, H, Tq, T) plus what tau_attention adds to its own: decay, key bias, and -inf where the key is in the future."""
    H, Tq, T = logits.shape[1:]
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype).repeat_interleave(H // key_bias.size(1), 1)[:, :, None]
    if log_decay is not None:
        steps = log_decay.to(finest(log_decay.device))
        steps = steps if log_decay.ndim == 3 else steps[None, :, None].expand(1, H, T)
        total = running_sum(steps)
        logits = logits + (total[..., T - Tq :, None] - total[..., None, :]).to(logits.dtype)
    future = torch.ones(Tq, T, dtype=torch.bool, device=logits.device).triu(T - Tq + 1)
    return logits.masked_fill(future, float("-inf"))


# The fast implementations share an interface: forward returns out and what backward needs beside it, namely lse (B, H, T), the
# log of the softmax's denominator, and diff (B, H, T, D) and diff_one (B, H, T), which are sum_j s_ij p_ij v_j and
# sum_j s_ij p_ij, with p_ij the softmax weights and s_ij the sign of lambda_q,i - lambda_k,j. (attention_triton returns other
# tensors in the places of diff and diff_one.) decay (B, H, T) is the running sum of log_decay. The sink is one more term of the
# denominator: with it all four are as if each weight had been multiplied by the same number, and backward is the same.


@torch.library.custom_op("tauformer::attention", mutates_args=())
def fast_attention(
    lambda_q: torch.Tensor,
    lambda_k: torch.Tensor,
    v: torch.Tensor,
    temperature: torch.Tensor,
    decay: torch.Tensor | None,
    bias: torch.Tensor | None,
    sink: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with float32_on_device_of(v):
        inputs = *contiguous(lambda_q, lambda_k), dense_rows(v), *contiguous(temperature, decay, bias)
        if impl in ("triton", "grid"):
            return backend(impl).forward(*inputs, *contiguous(sink))
        out, lse, diff, diff_one = backend(impl).forward(*inputs)
        if sink is not None:
            whole = torch.logaddexp(lse, sink[:, None])
            kept, lse = (lse - whole).exp().to(v.dtype), whole
            out, diff, diff_one = out * kept[..., None], diff * kept[..., None], diff_one * kept
        return out, lse, diff, diff_one


@torch.library.custom_op("tauformer::attention_backward", mutates_args=())
def fast_attention_backward(
    grad: torch.Tensor,
    lambda_q: torch.Tensor,
    lambda_k: torch.Tensor,
    v: torch.Tensor,
    temperature: torch.Tensor,
    decay: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    diff: torch.Tensor,
    diff_one: torch.Tensor,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of lambda_q, lambda_k, v and temperature, and (B, H, T) those of the keys' log weights, bias_j - decay_j."""
    with float32_on_device_of(v):
        return backend(impl).backward(
            dense_rows(grad),
            *contiguous(lambda_q, lambda_k),
            dense_rows(v),
            *contiguous(temperature, decay, bias),
            out,
            lse,
            diff,
            diff_one,
        )


@fast_attention.register_fake
def _(lambda_q, lambda_k, v, temperature, decay, bias, sink, impl):
    (B, H, T), D = lambda_q.shape, v.shape[-1]
    out, lse = v.new_empty(B, T, H, D).transpose(1, 2), temperature.new_empty(B, H, T)
    if impl == "triton":
        return out, lse, v.new_empty(2, B, H, T, D), lambda_q.new_empty(B, H, 2)
    if impl == "grid":
        return out, lse, v.new_empty(2, B, H, T, D), v.new_empty(sum(backend(impl).Bins.parts(B, H, T)), dtype=torch.int32)
    return out, lse, v.new_empty(B, H, T, D), v.new_empty(B, H, T)


@fast_attention_backward.register_fake
def _(grad, lambda_q, lambda_k, v, temperature, decay, bias, out, lse, diff, diff_one, impl):
    return (
        torch.empty_like(lambda_q, memory_format=torch.contiguous_format),
        torch.empty_like(lambda_k, memory_format=torch.contiguous_format),
        torch.empty_like(v.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2),
        temperature.new_empty(temperature.shape),
        temperature.new_empty(lambda_q.shape),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    *tensors, sink, out, lse, diff, diff_one = ctx.saved_tensors
    v, decay, bias = tensors[2], tensors[4], tensors[5]
    *grads, grad_weight = fast_attention_backward(grad, *tensors, out, lse, diff, diff_one, ctx.impl)
    grad_bias = grad_weight.unflatten(1, (v.shape[1], -1)).sum(2) if bias is not None else None
    grad_decay, grad_sink = -grad_weight if decay is not None else None, None
    if sink is not None:
        to_sink = (sink[:, None] - lse).exp() * (grad.float() * out.float()).sum(-1)
        grad_sink = -to_sink.sum((0, 2))
        if decay is not None:  # without a sink that of the queries' decay is 0, because softmax does not see what all logits share
            grad_decay = grad_decay + to_sink
    return *grads, grad_decay, grad_bias, grad_sink, None


fast_attention.register_autograd(_backward, setup_context=_save)


@contextmanager
def float32_on_device_of(v):
    """Inside the block v's GPU is the current one, and float32 matrix products are float32 even if training has allowed TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.cuda.device_of(v):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def contiguous(*tensors):
    return [tensor.contiguous() if tensor is not None else None for tensor in tensors]


def dense_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def by_token(x):
    """x (B, H, T, D), laid out in memory as (B, T, H, D), the layout that the projections around the operator use."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def backend(impl):
    if impl == "triton":
        from ops import attention_triton

        return attention_triton
    if impl == "grid":
        from ops import attention_grid

        return attention_grid
    return load_walk() if impl == "walk" else Tree


def fastest(device, context):
    """The impl that "auto" takes on a device. context: "short" is below 256 tokens, "long" from long_from(device) on, else "medium"."""
    return _fastest(device, context)


def long_from(device):
    """The context, in tokens, from which a device other than a CPU takes the grid, or where it cannot the tree."""
    return GRID_FROM if device == "cuda" and gpu_kernels() else 4096


# torch.compile calls these once and does not trace them: torch.compiler.assume_constant_result, without the seconds of its import
fastest._dynamo_marked_constant = long_from._dynamo_marked_constant = True


@functools.cache
def _fastest(device, context):  # reports its choice on standard error; cached, so once each
    tiles = device == "cuda" and gpu_kernels()
    if context == "short" and not tiles:
        return "naive"
    if device.startswith("cpu"):
        try:
            load_walk()
            impl, reason = "walk", "compiled for this CPU"
        except Exception as error:  # no compiler, or one that cannot compile this code
            impl, reason = "tree", f"attention.cpp could not be compiled: {first_line(error)}"
    else:
        if context == "long":
            impl = "grid" if tiles else "tree"
        else:
            impl = "triton" if tiles else "naive"
        reason = f"{'from' if context == 'long' else 'below'} {long_from(device):,} tokens{' on' if context == 'long' else ''}"
        if device == "cuda" and not tiles:
            reason += ", without the package triton or a GPU of compute capability 8.0"
    note(f"tau attention on {device}: {impl} ({reason})")
    return impl


@functools.cache
def gpu_kernels():
    """Whether attention_triton.py can be used on the current device: triton, CUDA, compute capability 8.0 or later."""
    return (
        importlib.util.find_spec("triton") is not None
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def check_triton(v, impl):
    """Raise ValueError unless impl, "triton" or "grid", applies to the values v (B, Hkv, T, D)."""
    try:
        from ops.attention_triton import INTERPRETED
    except ImportError as error:
        raise ValueError(f"impl={impl!r} needs the package triton: {error}") from None
    if v.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"impl={impl!r} needs a CUDA device, not {v.device.type}; on a CPU TRITON_INTERPRET=1 tries it, slowly")
    if v.size(3) > TRITON_WIDTH or v.dtype is torch.float64:
        raise ValueError(f"impl={impl!r} is for values of {TRITON_WIDTH} numbers at most, of 16 or 32 bits, not {v.size(3)} of {v.dtype}")


@functools.cache
def load_walk():
    return compiled("ops/attention.cpp", "tauformer_walk")


def compiled(source, namespace):
    """The torch.ops namespace of a C++ file, given by its path from the root: compiled for this machine's processor at first
    use and kept in torch's extension cache. Raises an error whose first line says why, if it cannot be."""
    import ninja

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that CUDA is absent, which is not needed here
    from torch.utils.cpp_extension import get_default_build_root, load

    source = ROOT / source
    processor = Path("/proc/cpuinfo")
    flags = (
        next((line for line in processor.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        if processor.exists()
        else ""
    )
    digest = hashlib.sha256((source.read_text() + torch.__version__ + platform.processor() + flags).encode()).hexdigest()[:16]
    path, name = os.environ.get("PATH", os.defpath), f"{namespace}_{digest}"
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root(), name)
        if "~" in folder.parts:
            raise OSError("there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"{first_line(error)} (TORCH_EXTENSIONS_DIR may name a folder for it)") from None
    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + path
    try:
        threads = ["-fopenmp"] if sys.platform == "linux" else []  # elsewhere one thread: torch ships no OpenMP headers
        with open(folder / "ours.lock", "w") as ours:  # one process compiles; if it is killed, the system frees this lock,
            fcntl.flock(ours, fcntl.LOCK_EX)  # but not torch's own lock file, for which later processes would wait forever
            (folder / "lock").unlink(missing_ok=True)
            try:
                torch.ops.load_library(folder / f"{name}.so")  # as it is, where ninja would compile it again for another checkout
            except OSError:  # there is none, or not the whole of it
                compiler = os.environ.get("CXX", "c++").split()
                if compiler and shutil.which(compiler[0]) and os.environ.get("RANK", "0") == "0":
                    print(f"compiling {source.name} for this machine, once: about half a minute ...", file=sys.stderr)
                load(
                    name,
                    [str(source)],
                    extra_cflags=["-O3", "-march=native", "-std=c++20", *threads],
                    extra_ldflags=threads,
                    build_directory=str(folder),
                    is_python_module=False,
                )
    except Exception as error:  # torch's says the whole command first
        compiler = os.environ.get("CXX", "c++")
        if not shutil.which((compiler.split() or [""])[0]):
            raise RuntimeError(f"there is no C++ compiler {compiler}") from None
        raise RuntimeError(next((line for line in str(error).splitlines() if "error:" in line), first_line(error))) from None
    finally:
        os.environ["PATH"] = path
    return getattr(torch.ops, namespace)


def ahead(n, device, diagonal=1):
    """Mask (n, n) of the pairs (i, j) with j >= i + diagonal."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(diagonal)


class Tree:
    """The mathematics of the walk (attention.cpp) without its loop over items. At each level the sources are sorted by
    position and their running sums are computed chunk by chunk: one matrix product sums inside the chunks, another carries
    sums from chunk to chunk. A receiver looks up the running sum at its rank among the sources. As in the walk, every
    exponent is <= 0."""

    @staticmethod
    def forward(lambda_q, lambda_k, v, temperature, decay, bias):
        B, H, T = lambda_q.shape
        keys, queries = Tree.positions(lambda_q, lambda_k, temperature, decay, bias)
        rows = torch.cat([v, torch.ones_like(v[..., :1])], -1).flatten(0, 1)  # (B Hkv, T, D + 1)
        total, diff, scale = Tree.sums(keys, queries, rows, H // v.shape[1], backward=False)
        Z = total[..., -1:]
        out, diff = total[..., :-1] / Z, diff / Z
        lse = scale + Z[..., 0].to(scale.dtype).log()
        return (
            by_token(out.view(B, H, T, -1)),
            lse.view(B, H, T),
            diff[..., :-1].reshape(B, H, T, -1).contiguous(),
            diff[..., -1].reshape(B, H, T).contiguous(),
        )

    @staticmethod
    def backward(grad, lambda_q, lambda_k, v, temperature, decay, bias, out, lse, diff, diff_one):
        B, H, T = lambda_q.shape
        group = H // v.shape[1]
        (xk, wk), (xq, wq) = Tree.positions(lambda_q, lambda_k, temperature, decay, bias)
        one = -(grad * out).sum(-1)
        da = -((grad * diff).sum(-1) + one * diff_one)  # (B, H, T)
        rows = torch.cat([grad, one[..., None]], -1).flatten(0, 1)
        total, diff, scale = Tree.sums((xk, wk), (xq, wq - lse.view(-1, T)), rows, 1, backward=True)
        back = scale.exp().to(v.dtype)[..., None]
        total, diff = ((x * back).view(B, -1, group, T, x.shape[-1]) for x in (total, diff))
        v = v[:, :, None]  # (B, Hkv, 1, T, D)
        grad_weight = ((total[..., :-1] * v).sum(-1) + total[..., -1]).view(B, H, T).to(scale.dtype)
        db = (diff[..., :-1] * v).sum(-1) + diff[..., -1]  # (B, Hkv, group, T)
        over = (1 / temperature).to(da.dtype)
        moment = (da * (xq - xq[:, :1]).view(B, H, T)).sum(-1) + (db.view(B, H, T) * (xk - xq[:, :1]).view(B, H, T)).sum(-1)
        return (
            da * over[:, None],
            (db * over.view(-1, group, 1)).sum(2),
            by_token(total[..., :-1].sum(2)),
            -moment.sum(0).to(temperature.dtype) / temperature,
            grad_weight,
        )

    @staticmethod
    def positions(lambda_q, lambda_k, temperature, decay, bias):
        """(x, w) of the keys and (x, w) of the queries, each (B H, T): positions x = lambda / temperature and log weights w."""
        B, H, T = lambda_q.shape
        scalar, group = temperature.dtype, H // lambda_k.shape[1]
        xk = lambda_k.to(scalar).repeat_interleave(group, 1) / temperature[:, None]
        xq = lambda_q.to(scalar) / temperature[:, None]
        wq = torch.zeros_like(xq) if decay is None else decay
        wk = -wq if bias is None else bias.repeat_interleave(group, 1) - wq
        return (xk.flatten(0, 1), wk.flatten(0, 1)), (xq.flatten(0, 1), wq.flatten(0, 1))

    @staticmethod
    def sums(keys, queries, rows, group, backward):
        """The pass of attention.cpp, from sources (keys; backward: queries) to receivers (the others). keys, queries:
        (x, w), each (N, T); rows: (N / group, T, E), of the sources. Returns (sum, diff, scale): sum and diff, (N, T, E),
        are in units of exp(scale), (N, T)."""
        (xs, ws), (xr, wr) = (queries, keys) if backward else (keys, queries)
        N, T = xs.shape
        E, device = rows.shape[-1], rows.device
        levels = max(0, math.ceil(math.log2(T / LEAF)))
        C = -(-T // 2**levels)  # tokens per leaf, items per chunk
        padded = C * 2**levels
        xs, xr, wr = (torch.nn.functional.pad(x, (0, padded - T)) for x in (xs, xr, wr))
        ws = torch.nn.functional.pad(ws, (0, padded - T), value=NOTHING)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, padded - T)).flatten(0, 1)
        head = (torch.arange(N, device=device) // group * padded)[:, None]  # where a head's rows begin
        plus = -1 if backward else 1  # diff: keys below minus keys above, or queries above minus queries below

        # leaves: (N, leaves, receiver, source)
        future = ahead(C, device)
        leaf = lambda x: x.view(N, -1, C)
        distance = leaf(xr)[..., :, None] - leaf(xs)[..., None, :]
        exponent = leaf(ws)[..., None, :] - distance.abs()
        exponent.masked_fill_(future.T if backward else future, NOTHING)
        scale = exponent.amax(-1)
        weight = (exponent - scale[..., None]).to(rows.dtype).exp()
        signed = torch.where(plus * distance >= 0, weight, -weight)
        leaf_rows = rows[(head + torch.arange(padded, device=device)).flatten()].view(N, -1, C, E)
        total, diff = (weight @ leaf_rows).view(N, padded, E), (signed @ leaf_rows).view(N, padded, E)
        scale = (scale + leaf(wr)).view(N, padded)

        for level in range(1, levels + 1):
            Tree.level(xs, ws, rows, head, xr, wr, total, diff, scale, C * 2 ** (level - 1), C, backward)
        return total[:, :T], diff[:, :T], scale[:, :T]

    @staticmethod
    def level(xs, ws, rows, head, xr, wr, total, diff, scale, half, C, backward):
        """From the sources in one half of each block of 2 * half tokens to the receivers in the other; updates total, diff, scale."""
        N, padded = xs.shape
        E, device = rows.shape[-1], rows.device
        plus, future = -1 if backward else 1, ahead(C, device)
        pair = lambda x, right: x.view(N, -1, 2, half, *x.shape[2:])[:, :, int(right)]  # (N, pairs, half, ...)
        x, order = pair(xs, backward).sort(stable=True)  # the sources, by position
        w = pair(ws, backward).gather(-1, order)
        pairs = x.shape[1]
        begin = torch.arange(pairs, device=device)[:, None] * 2 * half + half * backward
        chunk = lambda x: x.unflatten(2, (-1, C))  # (N, pairs, chunks, C, ...)
        source_rows = chunk(rows[(head[..., None] + begin + order).flatten()].view(N, pairs, half, E))

        # how many sources are below each receiver; at a tie the key counts as below the query
        position, log_weight = pair(xr, not backward).contiguous(), pair(wr, not backward)
        rank = torch.searchsorted(x, position, right=not backward)
        mine = lambda x: pair(x, not backward)
        parts = []
        for up in (True, False):
            # sums_j: the sum of the sources up to j, in units of exp(reach_j); downwards, of those from j on
            value = w + x if up else w - x
            reach = value.cummax(-1)[0] if up else value.flip(-1).cummax(-1)[0].flip(-1)
            reach_c = chunk(reach)
            inside = (chunk(value)[..., None, :] - reach_c[..., :, None]).to(rows.dtype)
            inside.masked_fill_(future if up else future.T, -torch.inf)
            sums = inside.exp_() @ source_rows  # (N, pairs, chunks, C, E)
            if half > C:  # plus the sum of all chunks before
                ends = reach_c[..., -1 if up else 0]  # (N, pairs, chunks)
                before, later = ends.roll(1 if up else -1, -1), ahead(half // C, device, 0)
                carry = ends[..., None, :] - before[..., :, None]
                carry = carry.masked_fill(later if up else later.T, -torch.inf).to(rows.dtype).exp()
                state = carry @ sums[..., -1 if up else 0, :]  # (N, pairs, chunks, E)
                share = (before[..., None] - reach_c).clamp_max(0).to(rows.dtype).exp()
                sums.addcmul_(share[..., None], state[..., None, :])
            at = rank - int(up)
            none, at = (at < 0) | (at >= half), at.clamp(0, half - 1)
            reached = reach.gather(-1, at) + (log_weight - position if up else log_weight + position)
            at = at + torch.arange(N * pairs, device=device).view(N, pairs, 1) * half
            parts.append((sums.view(-1, E)[at.flatten()].view(N, pairs, half, E), reached.masked_fill(none, NOTHING)))

        (below, below_scale), (above, above_scale) = parts
        highest = torch.maximum(mine(scale), torch.maximum(below_scale, above_scale))
        factor = lambda x: (x - highest).to(rows.dtype).exp()[..., None]
        below.mul_(factor(below_scale))
        above.mul_(factor(above_scale))
        kept = factor(mine(scale))
        mine(total).mul_(kept).add_(below).add_(above)
        mine(diff).mul_(kept).add_(below, alpha=plus).sub_(above, alpha=plus)
        mine(scale).copy_(highest)
