"""The attention operator against SDPA, 256 to 65,536 tokens."""

import functools
import itertools
import multiprocessing
import statistics
import sys
import time
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.report import HEAD_SIZE, HEADS, TOKENS, place, write
from common import peak_rss_mb, replacing
from ops.attention import by_token, tau_attention
from ops.dot import DOT_SCALE, dot_attention

SDPA = {"sdpa": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FORMS = {  # of tau attention, on a GPU: temperature, and whether with a forget gate and a bias per key
    "best": (0.02, True),  # a trained head of the best form
    "recall": (1e-4, True),  # a recall head at its start
    "published": (1.0, False),
}
OF_FORMS = (
    "sdpa",
    "cudnn",
    "dot_gate",
    "fla",
    "triton",
    "grid",
)  # dot_gate: dot product with gate and bias; fla: flash-linear-attention's gate
LONGEST = {
    "cpu": {"sdpa": 65536, "naive": 4096, "tree": 65536, "walk": 65536},  # beyond 4,096 dense weights no longer fit
    "cuda": {"sdpa": 65536, "cudnn": 65536, "naive": 2048, "triton": 65536, "grid": 65536},
}


def operator(impl, B, T, device, form="published"):
    """(forward, forward and backward): functions without arguments, on random inputs; on a GPU q, k and v are bfloat16."""
    temperature, terms = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, B, HEADS, T, HEAD_SIZE, generator=generator).unbind()
    if device == "cuda":  # laid out as a model's projections are
        q, k, v, grad = (by_token(x.to(device, torch.bfloat16)) for x in (q, k, v, grad))
    lambda_q, lambda_k = torch.rand(2, B, HEADS, T, generator=generator).to(device).unbind()
    inputs = [lambda_q, lambda_k, v] if impl in ("naive", "tree", "walk", "triton", "grid") else [q, k, v]
    if terms and impl not in SDPA:  # gates near their start, where head h forgets 2^(-8 h / H) a step
        slopes = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
        log_decay = -2 * slopes[:, None] * torch.rand(B, HEADS, T, generator=generator)
        inputs += [log_decay.to(device), torch.randn(B, HEADS, T, generator=generator).to(device)]
    inputs = [x.clone().requires_grad_() for x in inputs]

    def attend():
        if impl in SDPA:
            with sdpa_kernel(SDPA[impl]):
                return F.scaled_dot_product_attention(*inputs, is_causal=True)
        if impl == "dot_gate":
            return dot_attention(*inputs[:3], DOT_SCALE, *inputs[3:])
        if impl == "fla":
            q, k, v, log_decay = (x.transpose(1, 2) for x in inputs[:4])
            return forgetting_attention()(q, k, v, log_decay).transpose(1, 2)
        return tau_attention(*inputs[:3], temperature, *inputs[3:], impl=impl)

    def forward():
        attend()

    def both():
        attend().backward(grad)
        for x in inputs:
            x.grad = None

    return forward, both


@functools.cache
def forgetting_attention():
    """flash-linear-attention's kernel of the Forgetting Transformer (Lin et al. 2025), or None where the package is missing."""
    try:
        from fla.ops.forgetting_attn import parallel_forgetting_attn
    except ImportError:
        return None
    return parallel_forgetting_attn


calls = None  # (forward, forward and backward) of the operator that this process measures


def begin(impl, B, T, threads):
    """Get ready to time an operator in this fresh process. Returns the peak memory in MB of forward and backward, beyond
    that of the process and of the inputs."""
    global calls
    torch.set_num_threads(threads)
    operator(impl, 1, 128, "cpu")[1]()
    calls = operator(impl, B, T, "cpu")
    before = peak_rss_mb()
    calls[1]()
    return peak_rss_mb() - before


def seconds(which):
    """Wall-clock seconds of one call; of a short one, of the second call, which finds the threads awake and the caches warm."""
    for _ in range(2):
        start = time.perf_counter()
        calls[which]()
        taken = time.perf_counter() - start
        if taken > 2:
            break
    return taken


def cuda_seconds(call):
    """(wall-clock seconds of one call, with the launches; those of the GPU alone, which is kept waiting until all work is queued)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(4e9 * taken))  # clock ticks, of which a GPU makes 2e9 a second at most
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return taken, begin.elapsed_time(end) / 1e3


def bench_attention_cuda(args):
    rows, lengths = [], [256 * 2**i for i in range(9) if 256 * 2**i <= args.longest]
    if forgetting_attention() is None:
        print("flash-linear-attention is not installed: its forgetting attention is left out", file=sys.stderr)
    for form, T in itertools.product(FORMS, lengths):
        B = max(1, TOKENS["cuda"] // T)
        calls, memory = {}, {}
        contenders = [impl for impl, longest in LONGEST["cuda"].items() if T <= longest]
        if form != "published":
            contenders = [impl for impl in OF_FORMS if impl != "fla" or forgetting_attention()]
        for impl in contenders:
            calls[impl] = operator(impl, B, T, "cuda", form)
            calls[impl][1]()  # tunes the tiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[impl][1]()
            memory[impl] = (torch.cuda.max_memory_allocated() - before) / 2**20
        measured = {impl: ([], []) for impl in calls}
        for _ in tqdm(range(args.repeats + 1), desc=f"{form}, T = {T}", disable=None):  # the first is a warm-up
            for impl, both in calls.items():
                for call, times in zip(both, measured[impl]):
                    times.append(cuda_seconds(call))
        for impl, times in measured.items():
            (forward, gpu_forward), (both, gpu_both) = (1e3 * np.median(runs[1:], 0) for runs in times)
            rows.append(
                {
                    "form": form,
                    "impl": impl,
                    "B": B,
                    "T": T,
                    "forward_ms": forward,
                    "forward_backward_ms": both,
                    "gpu_forward_ms": gpu_forward,
                    "gpu_forward_backward_ms": gpu_both,
                    "runs": args.repeats,
                    "memory_mb": memory[impl],
                }
            )
        write("attention_cuda", with_ratios(rows), args)  # as it goes: the machine may be there for minutes
    draw(
        [
            row | {"forward_ms": row["gpu_forward_ms"], "forward_backward_ms": row["gpu_forward_backward_ms"]}
            for row in rows
            if row["form"] == "published"
        ],
        "attention_cuda",
    )


def with_ratios(rows):
    """The rows with their speed, forward and backward, to flash SDPA's, and to the better of flash and cuDNN."""
    for row in rows:
        same = {other["impl"]: other for other in rows if (other["form"], other["T"]) == (row["form"], row["T"])}
        for key, name in (("forward_backward_ms", "times_as_fast_as"), ("gpu_forward_backward_ms", "gpu_times_as_fast_as")):
            row[f"{name}_sdpa"] = same["sdpa"][key] / row[key]
            row[f"{name}_better"] = min(same[impl][key] for impl in SDPA if impl in same) / row[key]
    return rows


def bench_attention(args):
    """Time every operator in a process of its own, so that it does not reuse memory that another has just freed."""
    if args.device == "cuda":
        return bench_attention_cuda(args)
    rows, name, longest_of = [], "attention", LONGEST["cpu"]
    for T in (256 * 2**i for i in range(9) if 256 * 2**i <= args.longest):
        B = max(1, TOKENS["cpu"] // T)
        with ExitStack() as stack:
            pools = {
                impl: stack.enter_context(multiprocessing.get_context("spawn").Pool(1))
                for impl, longest in longest_of.items()
                if T <= longest
            }
            memory = {impl: pool.apply(begin, (impl, B, T, torch.get_num_threads())) for impl, pool in pools.items()}
            times = {impl: ([], []) for impl in pools}
            for repeat in tqdm(range(args.repeats + 1), desc=f"T = {T}", disable=None):  # the first is a warm-up
                for impl, pool in pools.items():
                    slow = repeat > 1 and times[impl][1][0] > 10
                    for which, measured in enumerate(times[impl]):
                        if not slow:
                            measured.append(pool.apply(seconds, (which,)))
        for impl, (forward, both) in times.items():
            rows.append(
                {
                    "impl": impl,
                    "B": B,
                    "T": T,
                    "forward_ms": 1e3 * statistics.median(forward[1:]),
                    "forward_backward_ms": 1e3 * statistics.median(both[1:]),
                    "runs": len(both) - 1,
                    "memory_mb": memory[impl],
                }
            )
    sdpa = {row["T"]: row["forward_backward_ms"] for row in rows if row["impl"] == "sdpa"}
    for row in rows:
        row["times_as_fast_as_sdpa"] = sdpa[row["T"]] / row["forward_backward_ms"]
    write(name, rows, args)
    draw(rows, name)


def draw(rows, name):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, key, label in zip(
        axes, ("forward_ms", "forward_backward_ms", "memory_mb"), ("forward, ms", "forward and backward, ms", "peak memory, MB")
    ):
        for impl in dict.fromkeys(row["impl"] for row in rows):
            points = [(row["T"], max(row[key], 1e-2) / row["B"]) for row in rows if row["impl"] == impl]
            axis.loglog(
                *zip(*points),
                marker=".",
                label={"sdpa": "flash SDPA (dot product)", "cudnn": "cuDNN's SDPA (dot product)"}.get(impl, f"tau, {impl}"),
            )
        axis.set(xlabel="tokens T", title=f"{label}, a sequence")
        axis.legend(fontsize="small")
    with replacing(place(f"{name}.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
