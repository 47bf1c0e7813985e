"""Measure: the attention operator, a whole training step, decoding, what the fast ways cost in accuracy, and the build of a
Laplacian.

    python bench.py attention                     # against flash SDPA, 256 to 65,536 tokens; --device=cuda: on a GPU
    python bench.py train_step --nanogpt=DIR      # the 30M model, and nanoGPT's from a checkout of it
    python bench.py decode                        # the 30M model, a token after 128 to 131,072 others
    python bench.py context --runs OUT_DIR ...    # the loss up to 8 times the trained context, by cache (runs/context.sh)
    python bench.py curves                        # 200 steps of the quick start, by every implementation
    python bench.py precision                     # the quick start with lambda in float32 and in bfloat16
    python bench.py laplacian                     # the build of a Laplacian, 2,000 to 320,272 rows
    python bench.py triton                        # what the GPU kernels take of registers and shared memory; needs no GPU

What is compared runs in turn, and medians are reported, because a machine is seldom quiet. Tables and figures go to
results/."""

import functools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import build_laplacian
import checkpoint
import model as model_file
import taumode
import train
from attention import tau_attention
from build_laplacian import NpyEmbeddings, laplacian_of, load_laplacian, random_distances
from cache import Cache, ExactCache, StreamCache
from common import Parser, UserError, commit, peak_rss_mb, replacing, run
from config import Settings
from data.corpus import Corpus
from data.energy import energies
from generate import for_decoding
from model import ModelConfig, Tauformer, bounded, energy, filtered_energy
from train import domain_laplacian, learning_rate, to_device, training_batch

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD_SIZE = 6, 64
TOKENS = {"cpu": 4096, "cuda": 32768}  # of a batch, where one sequence has not more
SDPA = {"sdpa": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
LONGEST = {"cpu": {"sdpa": 65536, "naive": 4096, "tree": 65536, "walk": 65536},  # dense weights no longer fit beyond
           "cuda": {"sdpa": 65536, "cudnn": 65536, "naive": 2048, "tree": 65536, "triton": 65536}}
EMBEDDED = (2000, 8000, 32027, 320272)  # rows; the last is the published run's
WITH_ARROWSPACE = (2000, 8000)
LAYERS, WIDTH, VOCABULARY = 6, 384, 30522  # configs/tau_30m.toml
SCORED = 50000  # tokens
LONG_CONTEXTS = (2**10, 2**12, 2**14, 2**16, 2**17)
SHARED_KB = {80: 163, 90: 227}  # that a block of threads may have, by compute capability


def in_own_process(function, *args):
    """So that it does not inherit the memory of what ran before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def operator(impl, B, T, device):
    """(forward, forward and backward): functions without arguments, on random inputs; queries, keys and values on a GPU in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, B, HEADS, T, HEAD_SIZE, generator=generator).to(
        device, torch.bfloat16 if device == "cuda" else torch.float32).unbind()
    lambda_q, lambda_k = torch.rand(2, B, HEADS, T, generator=generator).to(device).unbind()
    inputs = [q, k, v] if impl in SDPA else [lambda_q, lambda_k, v]
    inputs = [x.clone().requires_grad_() for x in inputs]

    def attend():
        if impl in SDPA:
            with sdpa_kernel(SDPA[impl]):
                return F.scaled_dot_product_attention(*inputs, is_causal=True)
        return tau_attention(*inputs, temperature=1.0, impl=impl)

    def forward():
        attend()

    def both():
        attend().backward(grad)
        for x in inputs:
            x.grad = None
    return forward, both


calls = None  # of the operator that a process of its own measures


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
    """Of one call; of a short one the second, which finds threads awake and the processor's cache its own."""
    for _ in range(2):
        start = time.perf_counter()
        calls[which]()
        taken = time.perf_counter() - start
        if taken > 2:
            break
    return taken


def cuda_seconds(call):
    """(of one call, all that the processor does for it included; of the GPU alone, which is kept waiting until all its work is there)."""
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
    rows = []
    for T in (256 * 2**i for i in range(9) if 256 * 2**i <= args.longest):
        B = max(1, TOKENS["cuda"] // T)
        calls, memory = {}, {}
        for impl in (impl for impl, longest in LONGEST["cuda"].items() if T <= longest):
            calls[impl] = operator(impl, B, T, "cuda")
            calls[impl][1]()  # tunes the tiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[impl][1]()
            memory[impl] = (torch.cuda.max_memory_allocated() - before) / 2**20
        measured = {impl: ([], []) for impl in calls}
        for _ in tqdm(range(args.repeats + 1), desc=f"T = {T}", disable=None):  # the first is a warm-up
            for impl, both in calls.items():
                for call, times in zip(both, measured[impl]):
                    times.append(cuda_seconds(call))
        for impl, times in measured.items():
            (forward, gpu_forward), (both, gpu_both) = (1e3 * np.median(runs[1:], 0) for runs in times)
            rows.append({"impl": impl, "B": B, "T": T, "forward_ms": forward, "forward_backward_ms": both, "gpu_forward_ms": gpu_forward,
                         "gpu_forward_backward_ms": gpu_both, "runs": args.repeats, "memory_mb": memory[impl]})
    for key in ("forward_backward_ms", "gpu_forward_backward_ms"):
        for row in rows:
            sdpa, = (other[key] for other in rows if other["impl"] == "sdpa" and other["T"] == row["T"])
            row[("gpu_" if key.startswith("gpu") else "") + "times_as_fast_as_sdpa"] = sdpa / row[key]
    write("attention_cuda", rows, args)
    draw([row | {"forward_ms": row["gpu_forward_ms"], "forward_backward_ms": row["gpu_forward_backward_ms"]} for row in rows], "attention_cuda")


def bench_attention(args):
    """Every operator in a process of its own, so that it does not meet memory that another has just given back."""
    if args.device == "cuda":
        return bench_attention_cuda(args)
    rows, name, longest_of = [], "attention", LONGEST["cpu"]
    for T in (256 * 2**i for i in range(9) if 256 * 2**i <= args.longest):
        B = max(1, TOKENS["cpu"] // T)
        with ExitStack() as stack:
            pools = {impl: stack.enter_context(multiprocessing.get_context("spawn").Pool(1))
                     for impl, longest in longest_of.items() if T <= longest}
            memory = {impl: pool.apply(begin, (impl, B, T, torch.get_num_threads())) for impl, pool in pools.items()}
            times = {impl: ([], []) for impl in pools}
            for repeat in tqdm(range(args.repeats + 1), desc=f"T = {T}", disable=None):  # the first is a warm-up
                for impl, pool in pools.items():
                    slow = repeat > 1 and times[impl][1][0] > 10
                    for which, measured in enumerate(times[impl]):
                        if not slow:
                            measured.append(pool.apply(seconds, (which,)))
        for impl, (forward, both) in times.items():
            rows.append({"impl": impl, "B": B, "T": T, "forward_ms": 1e3 * statistics.median(forward[1:]),
                         "forward_backward_ms": 1e3 * statistics.median(both[1:]), "runs": len(both) - 1, "memory_mb": memory[impl]})
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
    for axis, key, label in zip(axes, ("forward_ms", "forward_backward_ms", "memory_mb"),
                                ("forward, ms", "forward and backward, ms", "peak memory, MB")):
        for impl in dict.fromkeys(row["impl"] for row in rows):
            points = [(row["T"], max(row[key], 1e-2) / row["B"]) for row in rows if row["impl"] == impl]
            axis.loglog(*zip(*points), marker=".", label={"sdpa": "flash SDPA (dot product)", "cudnn": "cuDNN's SDPA (dot product)"}.get(impl, f"tau, {impl}"))
        axis.set(xlabel="tokens T", title=f"{label}, a sequence")
        axis.legend(fontsize="small")
    with replacing(RESULTS / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def train_step(contender, nanogpt, B, T, steps, compile, threads, device):
    """(seconds of a training step, median; peak memory in MB) of a 30M model, in a fresh process; on a GPU in bfloat16."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if contender == "nanogpt":
        sys.path.insert(0, nanogpt)
        sys.modules.pop("model")
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(block_size=T, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, dropout=0.0,
                              bias=False))
        loss_of = lambda model, idx, targets: model(idx, targets)[1]
    else:
        model = Tauformer(ModelConfig(block_size=T, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH,
                                      attention=contender),
                          torch.from_numpy(laplacian_of(random_distances(WIDTH, seed=0))))
        loss_of = lambda model, idx, targets: model(idx, targets)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model) if compile else model
    times = []
    for _ in range(steps + 1):  # the first is a warm-up
        idx, targets = torch.randint(VOCABULARY, (2, B, T), device=device).unbind()
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext():
            loss = loss_of(run, idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]), train.peak_mem_mb(torch.device(device))


def bench_train_step(args):
    contenders = ["tau", "dot"] + (["nanogpt"] if args.nanogpt else [])
    if args.nanogpt and not (Path(args.nanogpt) / "model.py").exists():
        raise UserError(f"--nanogpt={args.nanogpt}: there is no model.py; give a checkout of nanoGPT")
    rows = []
    for T in [length for length in (1024, 4096, 16384) if length <= args.longest]:
        B = max(1, TOKENS[args.device] // T)
        measured = {contender: [] for contender in contenders}
        for _ in tqdm(range(args.repeats), desc=f"T = {T}", disable=None):
            for contender in contenders:
                measured[contender].append(in_own_process(train_step, contender, args.nanogpt, B, T, args.steps, args.compile,
                                                          torch.get_num_threads(), args.device))
        for contender, results in measured.items():
            seconds, memory = (statistics.median(column) for column in zip(*results))
            rows.append({"model": contender, "B": B, "T": T, "compile": args.compile, "step_s": seconds,
                         "tokens_per_s": B * T / seconds, "memory_mb": memory, "runs": len(results)})
    base = {row["T"]: row for row in rows if row["model"] == contenders[-1]}
    for row in rows:
        row[f"speed_to_{contenders[-1]}"] = row["tokens_per_s"] / base[row["T"]]["tokens_per_s"]
        row[f"memory_to_{contenders[-1]}"] = row["memory_mb"] / base[row["T"]]["memory_mb"]
    write("train_step" + ("_cuda" if args.device == "cuda" else "") + ("_compiled" if args.compile else ""), rows, args)


def published_model(attention):
    """The published shape with random weights, for contexts of any length."""
    laplacian = torch.from_numpy(laplacian_of(np.ones((HEAD_SIZE, HEAD_SIZE)) - np.eye(HEAD_SIZE))) / HEAD_SIZE
    return for_decoding(Tauformer(ModelConfig(block_size=2**18, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH,
                                              attention=attention), laplacian if attention == "tau" else None).eval())


@torch.no_grad()
def stream_process_mb(contexts):
    """{tokens: MB that this process holds after so many of them have gone through the model, 1,024 at a time, and one alone}."""
    model, found = published_model("tau"), {}
    cache, generator = StreamCache(model.config), torch.Generator().manual_seed(0)
    for length in tqdm(range(1024, max(contexts) + 1, 1024), desc="stream's memory", disable=None):
        model(torch.randint(VOCABULARY, (1, 1023), generator=generator), cache=cache, head=False)
        model(torch.randint(VOCABULARY, (1, 1), generator=generator), cache=cache)
        if length in contexts:
            found[length] = resident_mb()
    return found


def bench_decode(args):
    """One token at a time from each kind of cache in turn: after 1 to 1,024 tokens of its own, the paper's table, and after long
    contexts. Weights are random."""
    models = {attention: published_model(attention) for attention in ("tau", "dot")}
    kinds = {"dot, (K, V)": ("dot", Cache), "tau, dense": ("tau", Cache), "tau, exact": ("tau", ExactCache),
             "tau, stream": ("tau", lambda config, length: StreamCache(config))}
    token = torch.zeros(1, 1, dtype=torch.long)

    def measured(contexts, tokens):
        """{(tokens before, kind): (seconds of each of so many tokens, bytes of the cache at the end)}, one token of each in turn."""
        caches = {(n, kind): filled(models[attention], make(models[attention].config, n + tokens), n)
                  for n in contexts for kind, (attention, make) in kinds.items()}
        times = {key: [] for key in caches}
        for _ in tqdm(range(tokens), desc=f"after {', '.join(f'{n:,}' for n in contexts)}", disable=None):
            for (n, kind), cache in caches.items():
                start = time.perf_counter()
                models[kinds[kind][0]](token, cache=cache)
                times[n, kind].append(time.perf_counter() - start)
        return {key: (times[key], cache.nbytes()) for key, cache in caches.items()}

    rows, contexts = [], [n for n in LONG_CONTEXTS if n <= args.longest]
    process_mb = in_own_process(stream_process_mb, contexts) if sys.platform == "linux" else {}
    with torch.no_grad():
        for repeat in range(args.repeats):
            for (_, kind), (times, size) in measured([0], 1024).items():
                rows += [{"table": "own tokens", "kind": kind, "context": n, "seconds": times[:n], "cache_mb": size / 1e6}
                         for n in (128, 256, 512, 1024)]
            for (n, kind), (times, size) in measured(contexts, 40).items():
                rows.append({"table": "long context", "kind": kind, "context": n, "seconds": times[8:], "cache_mb": size / 1e6})
    results = []
    for table, kind, n in dict.fromkeys((row["table"], row["kind"], row["context"]) for row in rows):
        runs = [row for row in rows if (row["table"], row["kind"], row["context"]) == (table, kind, n)]
        ms = 1e3 * np.array([row["seconds"] for row in runs])
        results.append({"table": table, "kind": kind, "context": n, "p50_ms": float(np.median(ms)), "p95_ms": float(np.percentile(ms, 95)),
                        "mean_ms": float(np.median(ms.mean(1))), "cache_mb": runs[0]["cache_mb"], "runs": len(runs),
                        "process_mb": process_mb.get(n, "-") if (table, kind) == ("long context", "tau, stream") else "-"})
    dot = {(row["table"], row["context"]): row for row in results if row["kind"].startswith("dot")}
    for row in results:
        row["times_as_fast_as_dot"] = dot[row["table"], row["context"]]["p50_ms"] / row["p50_ms"]
    write("decode", results, args)
    draw_decode([row for row in results if row["table"] == "long context"])


def draw_decode(rows):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for axis, key, label in zip(axes, ("p50_ms", "cache_mb"), ("ms a token, median", "cache, MB")):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            axis.loglog(*zip(*((row["context"], row[key]) for row in rows if row["kind"] == kind)), marker=".", label=kind)
        axis.set(xlabel="tokens of context", title=label)
        axis.legend(fontsize="small")
    with replacing(RESULTS / "decode.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


@torch.no_grad()
def bench_context(args):
    """Loss of trained models on at least 50,000 tokens of validation text, in windows 8 times as long as those they were trained on, and by
    the position in the window, with each cache."""
    if not args.runs or not args.data_dir:
        raise UserError("context: name trained models with --runs OUT_DIR ..., and their text with --data_dir")
    corpus, rows = Corpus(args.data_dir), []
    for out_dir in args.runs:
        path = checkpoint.find(out_dir)
        model = checkpoint.build_model(*checkpoint.read(path), path).eval()
        if model.config.attention != "tau" or model.config.vocab_size != corpus.vocab_size:
            raise UserError(f"{out_dir}: context is for attention = \"tau\" and the text a model was trained on; this is attention = "
                            f"\"{model.config.attention}\" of {model.config.vocab_size:,} tokens, {args.data_dir} has {corpus.vocab_size:,}")
        T = model.config.block_size
        if len(corpus.val) <= SCORED + 8 * T:
            raise UserError(f"{args.data_dir}: {len(corpus.val):,} tokens of validation are too few for {SCORED:,} and a window of {8 * T:,}")
        windows = torch.from_numpy(corpus.batch(np.arange(-(-SCORED // (8 * T))) * 8 * T, 8 * T, "val"))
        losses = {}
        for kind, cache in (("plain", lambda: Cache(model.config, 8 * T)), ("exact", lambda: ExactCache(model.config, 8 * T)),
                            ("stream", lambda: StreamCache(model.config))):
            parts = []
            for idx in tqdm(windows.split(8), desc=f"{out_dir}, {kind}", disable=None):
                kept = cache()
                logits = [model.logits(model(part, cache=kept, head=False)) for part in idx[:, :-1].split(T, 1)]
                parts.append(F.cross_entropy(torch.cat(logits, 1).transpose(1, 2), idx[:, 1:], reduction="none"))
            losses[kind] = torch.cat(parts).double()
        for begin in range(0, 8 * T, T):
            rows.append({"run": str(out_dir), "positions": f"{begin}..{begin + T - 1}"}
                        | {kind: loss[:, begin:begin + T].mean().item() for kind, loss in losses.items()})
        rows.append({"run": str(out_dir), "positions": f"all {windows[:, 1:].numel():,}"}
                    | {kind: loss.mean().item() for kind, loss in losses.items()})
    write("context", rows, args)


CURVES = [("naive", "float32", False), ("naive", "float32", True), ("walk", "float32", False), ("tree", "float32", False),
          ("naive", "float64", False), ("walk", "float64", False), ("tree", "float64", False)]


def filled(model, cache, n):
    """The cache after n tokens whose keys and values are random: that of real ones would take hours to make for dot."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    numbers = lambda *shape: torch.randn(1, config.n_head, n, *shape, generator=generator)
    for layer in range(config.n_layer):
        keys = numbers(config.head_size) if config.attention == "dot" else numbers().sigmoid()
        values = numbers(config.head_size)
        cache.attend(layer, lambda *inputs: inputs[2])(keys, keys, values, config.temperature, None, None)
    cache.length = n
    return cache


def bench_curves(args):
    """How far the training losses of 200 steps of the quick start are from those of the dense reference, and, for scale,
    how far those are when one weight matrix starts one rounding error, 1e-7, away."""
    settings = Settings(**tomllib.loads((Path(__file__).parent / "configs" / "quickstart_published.toml").read_text()))
    settings.laplacian = f"{settings.data_dir}/laplacian.parquet"
    corpus, laplacian, curves, rows = Corpus(settings.data_dir), domain_laplacian(settings), {}, []
    names = ("n_layer", "n_head", "n_embd", "block_size", "softcap", "temperature")
    for impl, dtype, moved in CURVES:
        torch.manual_seed(settings.seed)
        model = Tauformer(ModelConfig(vocab_size=corpus.vocab_size, **{name: getattr(settings, name) for name in names}), laplacian)
        model.to(getattr(torch, dtype))
        if moved:
            model.blocks[0].attention.query.weight.data.mul_(1 + 1e-7)
        model_file.tau_attention = functools.partial(tau_attention, impl=impl)
        batch = lambda step: to_device(training_batch(corpus, settings, settings.block_size, step, 0), torch.device("cpu"))
        taumode.calibrate(model, [batch(0)[0]], settings)
        weights = list(model.parameters())
        optimizer = torch.optim.AdamW(weights, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)
        losses = []
        for step in tqdm(range(200), desc=f"{impl}, {dtype}", disable=None):
            optimizer.param_groups[0]["lr"] = learning_rate(settings, step, 1.0)
            loss = model(*batch(step))
            loss.backward()
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(weights, settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        curves[impl, dtype, moved] = torch.tensor(losses, dtype=torch.float64)
        reference = curves["naive", dtype, False]
        apart = (curves[impl, dtype, moved] - reference).abs()
        rows.append({"impl": impl, "dtype": dtype, "moved": moved, "last_loss": losses[-1], "apart_at_most": f"{apart.max():.1e}",
                     "relative": f"{(apart / reference).max():.1e}"})
    write("curves", rows, args)


def rounded(x):
    return x.bfloat16().float()


def quickstart(lambda_dtype, seed, threads):
    """Best validation loss of the quick start, in this process, which is rounded for good. lambda_dtype float32: as it is; bfloat16: what energies
    are made of, energies and lambdas are rounded, and sums float32, as a matrix product in bfloat16 has it."""
    torch.set_num_threads(threads)
    if lambda_dtype == "bfloat16":
        model_file.energy = lambda x, L: rounded(energy(rounded(x), rounded(L)))
        model_file.filtered_energy = lambda x, roots, log_filter: rounded(filtered_energy(rounded(x), rounded(roots), log_filter))
        model_file.bounded = lambda E, tau: rounded(bounded(E, tau))
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py", str(Path(__file__).parent / "configs" / "quickstart.toml"), f"--seed={seed}",
                    f"--out_dir={folder}/run", f"--results={folder}/runs.jsonl"]
        train.main()
        metrics = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return min(row["loss"] for row in metrics if row["split"] == "val")


def bench_precision(args):
    """The quick start with energies and lambdas in float32, as they are, and in bfloat16; all else is float32."""
    rows = [{"lambda": dtype, "seed": seed, "val_loss": f"{in_own_process(quickstart, dtype, seed, torch.get_num_threads()):.4f}"}
            for seed in (1, 2, 3) for dtype in ("float32", "bfloat16")]
    write("precision", rows, args)


def resident_mb():
    """What this process holds in memory, in MB, without mapped files; Linux only."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**10


def measured_build(embeddings, out):
    """(seconds, MB above what the libraries hold) of build_laplacian.py, in this process."""
    before, most, done = resident_mb(), 0.0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.005):
            most = max(most, resident_mb())
    watcher = threading.Thread(target=watch)
    watcher.start()
    sys.argv = ["build_laplacian.py", str(embeddings), f"--out={out}", "--overwrite"]
    begin = time.perf_counter()
    build_laplacian.main()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, most - before


def measured_arrowspace(embeddings, laplacian):
    """(seconds, rank correlation of its lambdas with our energies) of the arrowspace package; None without it."""
    try:
        from arrowspace import ArrowSpaceBuilder
    except ImportError:
        return None
    from scipy.stats import spearmanr
    x = np.load(embeddings).astype(np.float64)
    begin = time.perf_counter()
    space, _ = ArrowSpaceBuilder.build({"eps": 1.31, "k": 25, "topk": 15, "p": 1.8, "sigma": 0.535}, x)
    return time.perf_counter() - begin, spearmanr(energies(x, load_laplacian(laplacian)), space.lambdas()).statistic


def bench_laplacian(args):
    """The build of a Laplacian from 2,000 to 320,272 rows of 384 features, float32: those of --embeddings, repeated as
    often as it takes, or random ones. Beside it, where it is installed, the arrowspace package."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {count: Path(folder) / f"{count}.npy" for count in EMBEDDED}
        source = np.load(NpyEmbeddings(Path(args.embeddings)).path) if args.embeddings else None
        for count, path in files.items():
            generator = np.random.default_rng(0)
            mixing = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32)
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (
                    count, WIDTH if source is None else source.shape[1])})
                for first in range(0, count, 10000):
                    n = min(10000, count - first)
                    x = (generator.standard_normal((n, WIDTH), np.float32) @ mixing if source is None
                         else source[np.arange(first, first + n) % len(source)])
                    x.astype(np.float32).tofile(file)
        found = {count: [] for count in files}
        for _ in range(args.repeats):
            for count, path in files.items():
                found[count].append(in_own_process(measured_build, path, path.with_suffix(".parquet")))
        for count, path in files.items():
            seconds, memory = (statistics.median(values) for values in zip(*found[count]))
            rows.append({"rows": count, "seconds": seconds, "memory_mb": memory, "arrowspace_s": "-", "rank_correlation": "-"})
            if count in WITH_ARROWSPACE:
                theirs = in_own_process(measured_arrowspace, path, path.with_suffix(".parquet"))
                if theirs is None:
                    print("without arrowspace, which is not installed (pip install arrowspace)", file=sys.stderr)
                else:
                    rows[-1] |= {"arrowspace_s": theirs[0], "rank_correlation": theirs[1]}
    write("laplacian", rows, args)


def kernel_resources(what):
    """What ptxas says of a kernel: its name in attention_triton, tile, width of a head, type of the values, whether with decay and
    bias, whether of the backward pass, compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    import attention_triton
    name, (M, N, warps, stages, registers), width, values, terms, backward, capability = what
    kernel = triton.jit(getattr(attention_triton, name))
    constants = {"D": width, "WIDTH": width, "PAD": attention_triton.PAD, "HALF": values == "fp16", "INTERPRET": False, "BACKWARD": backward,
                 "BLOCK": M, "M": M, "N": N, "C": M, "COLS": N}
    if name != "level_kernel":
        constants |= dict.fromkeys(("lse", "spread") if backward and name == "sums_kernel" else ("grad_k", "grad_weight")) | (
            {} if terms else dict.fromkeys(("decay", "bias", "reach")))
    constants |= {"moment": None} if name == "sums_kernel" and not backward else {}
    types = dict.fromkeys(("v", "source", "out", "spread", "grad", "dout"), values) | {"reach": "i32", "order": "i64"} | dict.fromkeys(
        ("lambda_q", "lambda_k", "receiver_x", "middle", "factors", "grad_q", "grad_k", "moment", "values", "total", "diff"), "fp32"
        ) | dict.fromkeys(("temperature", "decay", "bias", "lse", "grad_weight", "x", "w", "scale", "new_scale"), "fp64")
    types["weight"] = "fp64" if name == "level_kernel" else "fp32"
    signature = {p: "constexpr" if p in constants else "*" + types[p] if p in types else "fp32" if p == "sign" else "i32"
                 for p in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.arg_names)
               if p not in constants and (p in types or p[-2:] in ("_b", "_h", "_t"))}
    source = ASTSource(kernel, signature, {(i,): constants[p] for i, p in enumerate(kernel.arg_names) if p in constants}, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages, "maxnreg": registers})
    with tempfile.TemporaryDirectory() as folder:
        (ptx := Path(folder) / "kernel.ptx").write_text(compiled.asm["ptx"])
        said = subprocess.run([get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{capability}{'a' * (capability == 90)}",
                               ptx, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
    number = lambda pattern: int(re.search(pattern, said)[1])
    return {"kernel": name, "tile": f"{M} x {N}", "warps": warps, "stages": stages, "head_size": width, "values": values,
            "decay_and_bias": terms, "backward": backward, "capability": capability / 10, "registers": number(r"Used (\d+) registers"), "shared_kb": compiled.metadata.shared / 2**10,
            "spilled_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")}


def bench_triton(args):
    """Compile every kernel with every tile that autotuning may take, ahead of time. Ends with an error where one does not fit."""
    try:
        from attention_triton import KEYS_BLOCK, LEVEL_TILE, QUERIES_BLOCK, TILES
    except ImportError as error:
        raise UserError(f"triton needs the package triton: pip install triton==3.9.0 ({error})") from None
    types, both, default = ("bf16", "fp32"), (False, True), (1, 4, 3, None)
    every = [("sums_kernel", tile, width, values, terms, backward, capability) for tile in TILES for width in (64, 128) for values in types
             for terms in both for backward in both for capability in SHARED_KB]
    every += [("key_kernel", (KEYS_BLOCK, *default), 0, values, terms, False, capability) for values in types for terms in both for capability in SHARED_KB]
    every += [("query_kernel", (QUERIES_BLOCK, *default), width, values, True, True, capability) for width in (64, 128) for values in types for capability in SHARED_KB]
    every += [("level_kernel", (*LEVEL_TILE, None), 0, "fp32", True, True, capability) for capability in SHARED_KB]
    with multiprocessing.get_context("spawn").Pool() as pool:
        rows = list(tqdm(pool.imap(kernel_resources, every), total=len(every), disable=None))
    write("triton_resources", rows, args)
    for row in rows:
        if row["shared_kb"] > SHARED_KB[round(10 * row["capability"])]:
            raise UserError(f"no such device has so much shared memory: {row}")


def write(name, rows, args):
    """Print a table and write it, with what it was measured on, to results/NAME.json."""
    columns = list(rows[0])
    cells = [columns] + [[f"{value:.3g}" if isinstance(value, float) and value < 100 else
                          f"{value:,.0f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells))
    with replacing(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({
            "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit(),
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            **({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}), "rows": rows}, indent=1) + "\n")


def main():
    options = Parser(__doc__)
    options.add_argument("what", choices=("attention", "train_step", "decode", "context", "curves", "precision", "laplacian", "triton"))
    options.add_argument("--nanogpt", metavar="DIR", help="train_step: a checkout of nanoGPT to measure too")
    options.add_argument("--embeddings", metavar="FILE.npy", help="laplacian: rows to repeat (default: random ones)")
    options.add_argument("--runs", nargs="+", metavar="OUT_DIR", help="context: trained models")
    options.add_argument("--data_dir", metavar="DIR", help="context: the corpus they were trained on")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="attention, train_step: where (default: %(default)s)")
    options.add_argument("--compile", action="store_true", help="train_step: torch.compile every model")
    options.add_argument("--longest", type=int, default=131072, help="tokens; attention: 65,536 at most (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=5, help="runs, of which the median (default: %(default)s)")
    options.add_argument("--steps", type=int, default=3, help="train_step: steps of a run (default: %(default)s)")
    args = options.parse_args()
    if args.device == "cuda" and args.what not in ("attention", "train_step"):
        raise UserError("--device=cuda is for attention and train_step")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: torch finds no CUDA device")
    for name, least in (("longest", 1024), ("repeats", 1), ("steps", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {least}")
    {"attention": bench_attention, "train_step": bench_train_step, "decode": bench_decode, "context": bench_context, "curves": bench_curves,
     "precision": bench_precision, "laplacian": bench_laplacian, "triton": bench_triton}[args.what](args)


if __name__ == "__main__":
    run(main)
