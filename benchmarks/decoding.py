"""Decoding a token after 1 to 131,072 others, and the loss of a trained model at positions beyond those it was trained on."""

import itertools
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks import training
from benchmarks.report import HEAD_SIZE, HEADS, LAYERS, VOCABULARY, WIDTH, in_own_process, place, resident_mb, write
from common import UserError, first_line, replacing
from data.corpus import Corpus
from data.laplacian import laplacian_of
from decoding.cache import Cache, ExactCache, StreamCache, make_cache
from decoding.generate import PIECE, decoder, for_decoding, prefill
from decoding.stream import RECENT
from model import ModelConfig, Tauformer
from training import checkpoint

SCORED = 50000  # tokens
KINDS = ("plain", "exact", "stream", "windows")
LONG_CONTEXTS = (2**10, 2**12, 2**14, 2**16, 2**17)
BEST_CONTEXT = 2**12
WARM_UP = 2 * RECENT  # tokens of each cache on a GPU, in which a stream's CUDA graphs are made
BATCHES, BATCH_CONTEXTS = (1, 16), (2**10, 2**14, 2**16, 2**17)  # on a GPU


def published_model(attention):
    """The published shape with random weights, for contexts of any length."""
    laplacian = torch.from_numpy(laplacian_of(np.ones((HEAD_SIZE, HEAD_SIZE)) - np.eye(HEAD_SIZE))) / HEAD_SIZE
    return for_decoding(
        Tauformer(
            ModelConfig(block_size=2**18, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, attention=attention),
            laplacian if attention == "tau" else None,
        ).eval()
    )


def best_models():
    """The best forms of the twin and of tau, and tau's without its recall heads."""
    tau = "tau_30m_best.toml"
    forms = {"dot best": ("dot_30m_best.toml", {}), "tau best": (tau, {}), "tau best without recall heads": (tau, {"recall_heads": 0})}
    return {name: for_decoding(training.model_of(*form, 2 * BEST_CONTEXT).eval()) for name, form in forms.items()}


@torch.no_grad()
def stream_process_mb(contexts):
    """{tokens: resident MB of this process after so many tokens have gone through the model, of every 1,024 the last one alone}."""
    model, found = published_model("tau"), {}
    cache, generator = StreamCache(model.config), torch.Generator().manual_seed(0)
    for length in tqdm(range(1024, max(contexts) + 1, 1024), desc="stream's memory", disable=None):
        model(torch.randint(VOCABULARY, (1, 1023), generator=generator), cache=cache, head=False)
        model(torch.randint(VOCABULARY, (1, 1), generator=generator), cache=cache)
        if length in contexts:
            found[length] = resident_mb()
    return found


def bench_decode(args):
    """One token at a time from each kind of cache in turn: after 1 to 1,024 tokens that it generated itself, as in the paper's table,
    and after long contexts; the best forms after one. Weights are random."""
    if args.device == "cuda":
        return bench_decode_batches(args)
    models = {attention: published_model(attention) for attention in ("tau", "dot")}
    streamed = lambda config, length: StreamCache(config)
    published = {
        "dot, (K, V)": (models["dot"], Cache),
        "tau, dense": (models["tau"], Cache),
        "tau, exact": (models["tau"], ExactCache),
        "tau, stream": (models["tau"], streamed),
    }
    twin, *taus = best_models().items()
    best = {f"{twin[0]}, (K, V)": (twin[1], Cache)}
    best |= {f"{name}, {cache}": (model, make) for name, model in taus for cache, make in (("exact", ExactCache), ("stream", streamed))}

    def measured(kinds, contexts, tokens, fill=filled):
        """{(tokens before, kind): (seconds of each of `tokens` tokens, bytes of the cache at the end)}, one token of each in turn."""
        caches = {(n, kind): fill(model, make(model.config, n + tokens), n) for n in contexts for kind, (model, make) in kinds.items()}
        times = {key: [] for key in caches}
        for _ in tqdm(range(tokens), desc=f"after {', '.join(f'{n:,}' for n in contexts)}", disable=None):
            token = torch.randint(models["tau"].config.vocab_size, (1, 1))
            for (n, kind), cache in caches.items():
                start = time.perf_counter()
                kinds[kind][0](token, cache=cache)
                times[n, kind].append(time.perf_counter() - start)
        return {key: (times[key], cache.nbytes()) for key, cache in caches.items()}

    rows, contexts = [], [n for n in LONG_CONTEXTS if n <= args.longest]
    process_mb = in_own_process(stream_process_mb, contexts) if sys.platform == "linux" else {}
    with torch.no_grad():
        for repeat in range(args.repeats):
            for (_, kind), (times, size) in measured(published, [0], 1024).items():
                rows += [
                    {"table": "own tokens", "kind": kind, "context": n, "seconds": times[:n], "cache_mb": size / 1e6}
                    for n in (128, 256, 512, 1024)
                ]
            long, of_best = measured(published, contexts, 40), measured(best, [BEST_CONTEXT], 200, after_tokens)
            for table, found in (("long context", long), ("best forms", of_best)):
                for (n, kind), (times, size) in found.items():
                    rows.append({"table": table, "kind": kind, "context": n, "seconds": times[8:], "cache_mb": size / 1e6})
    results = []
    for table, kind, n in dict.fromkeys((row["table"], row["kind"], row["context"]) for row in rows):
        runs = [row for row in rows if (row["table"], row["kind"], row["context"]) == (table, kind, n)]
        ms = 1e3 * np.array([row["seconds"] for row in runs])
        results.append(
            {
                "table": table,
                "kind": kind,
                "context": n,
                "p50_ms": float(np.median(ms)),
                "p95_ms": float(np.percentile(ms, 95)),
                "mean_ms": float(np.median(ms.mean(1))),
                "cache_mb": runs[0]["cache_mb"],
                "runs": len(runs),
                "process_mb": process_mb.get(n, "-") if (table, kind) == ("long context", "tau, stream") else "-",
            }
        )
    dot = {(row["table"], row["context"]): row for row in results if row["kind"].startswith("dot")}
    for row in results:
        row["times_as_fast_as_dot"] = dot[row["table"], row["context"]]["p50_ms"] / row["p50_ms"]
    write("decode", results, args)
    draw_decode([row for row in results if row["table"] == "long context"])


@torch.no_grad()
def bench_decode_batches(args):
    """One token at a time of each sequence of a batch, after long contexts, from each kind of cache: wall-clock time with the launches, as
    sample.py decodes once a stream's graphs are made. One cache is in memory at a time; what does not fit is left out. Weights are
    random."""
    device, rows = torch.device(args.device), []
    models = {attention: published_model(attention).to(device) for attention in ("dot", "tau")}
    kinds = {"dot, (K, V)": ("dot", "exact"), "tau, exact": ("tau", "exact"), "tau, stream": ("tau", "stream")}
    for batch, n in itertools.product(BATCHES, [n for n in BATCH_CONTEXTS if n <= args.longest]):
        cells = {}
        for kind, (attention, name) in tqdm(kinds.items(), desc=f"batch {batch}, after {n:,}", disable=None):
            try:
                ms, cache_mb, memory_mb = decoding_of(models[attention], name, batch, n, 32 * args.repeats)
            except (torch.OutOfMemoryError, UserError) as error:
                print(f"{kind}, batch {batch}, after {n:,} tokens: {first_line(error)}", file=sys.stderr)
                continue
            p50, p95 = (float(np.percentile(ms, percent)) for percent in (50, 95))
            cells[kind] = {"kind": kind, "batch": batch, "context": n, "p50_ms": p50, "p95_ms": p95, "tokens_per_s": 1e3 * batch / p50}
            cells[kind] |= {"cache_mb": cache_mb, "memory_mb": memory_mb}
        dot = cells.get("dot, (K, V)")
        rows += [cell | {"times_as_fast_as_dot": dot["p50_ms"] / cell["p50_ms"] if dot else "-"} for cell in cells.values()]
        write("decode_cuda", rows, args)  # as it goes: the machine may be there for minutes


def decoding_of(model, name, batch, n, tokens):
    """(milliseconds of each of `tokens` tokens after n others, MB of the cache called `name`, MB that it and the step take on a GPU)"""
    device, ms = model.head.weight.device, []
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved() if on_gpu else 0  # a graph's memory counts as reserved, not as allocated
    cache = filled(model, make_cache(name, model.config, device, n + tokens + WARM_UP), n, batch)
    decode = decoder(model, cache)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + tokens):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        decode(token)
        if on_gpu:
            torch.cuda.synchronize()
        ms.append(1e3 * (time.perf_counter() - start))
    memory_mb = (torch.cuda.max_memory_reserved() - before) / 2**20 if on_gpu else "-"
    return ms[WARM_UP:], cache.nbytes() / 1e6, memory_mb


def filled(model, cache, n, batch=1):
    """The cache after n tokens with random keys and values: computing real ones would take hours for dot."""
    config, device = model.config, model.head.weight.device
    generator = torch.Generator(device).manual_seed(0)
    while cache.length < n:
        T = min(n - cache.length, PIECE if isinstance(cache, StreamCache) else n)  # tokens at a time
        numbers = lambda *shape: torch.randn(batch, config.n_head, T, *shape, generator=generator, device=device)
        for layer in range(config.n_layer):
            keys = numbers(config.head_size) if config.attention == "dot" else numbers().sigmoid()
            values = numbers(config.head_size)
            cache.attend(layer, lambda *inputs, **_: inputs[2])(keys, keys, values, config.temperature, None, None)
        cache.length += T
    return cache


def after_tokens(model, cache, n):
    """The cache after n random tokens."""
    prefill(model, torch.randint(model.config.vocab_size, (1, n)), cache)
    return cache


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
    with replacing(place("decode.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def trained_models(args):
    """(OUT_DIR, model, corpus) of each of --runs."""
    if not args.runs or not args.data_dir:
        raise UserError(f"{args.what}: name trained models with --runs OUT_DIR ..., and their text with --data_dir")
    corpus = Corpus(args.data_dir)
    for out_dir in args.runs:
        path = checkpoint.find(out_dir)
        model = checkpoint.build_model(*checkpoint.read(path), path).eval()
        if model.config.vocab_size != corpus.vocab_size:
            raise UserError(
                f"{out_dir}: {args.what} is for the text that a model was trained on; this is one of {model.config.vocab_size:,} tokens, "
                f"{args.data_dir} has {corpus.vocab_size:,}"
            )
        yield out_dir, model, corpus


@torch.no_grad()
def bench_context(args):
    """Loss of trained models on at least 50,000 tokens of validation text, in windows 8 times as long as those they were trained on,
    by the position in the window and by cache; and, in `windows`, in windows of the trained length, each half a window after the one
    before it, of whose tokens the last half counts (of the first one all)."""
    rows = []
    for out_dir, model, corpus in trained_models(args):
        T = model.config.block_size
        if len(corpus.val) <= SCORED + 8 * T:
            raise UserError(
                f"{args.data_dir}: {len(corpus.val):,} tokens of validation are too few for {SCORED:,} and a window of {8 * T:,}"
            )
        windows = torch.from_numpy(corpus.batch(np.arange(-(-SCORED // (8 * T))) * 8 * T, 8 * T, "val"))
        caches = {"plain": Cache} | ({} if model.config.attention == "dot" else {"exact": ExactCache, "stream": StreamCache})
        losses = {kind: [] for kind in (*caches, "windows")}
        for idx in tqdm(windows.split(8), desc=str(out_dir), disable=None):
            for kind, cache in caches.items():
                kept = cache(model.config)
                logits = [model.logits(model(part, cache=kept, head=False)) for part in idx[:, :-1].split(T, 1)]
                losses[kind].append(F.cross_entropy(torch.cat(logits, 1).transpose(1, 2), idx[:, 1:], reduction="none"))
            logits = [model(idx[:, begin : begin + T])[:, T // 2 if begin else 0 :] for begin in range(0, 7 * T + 1, T // 2)]
            losses["windows"].append(F.cross_entropy(torch.cat(logits, 1).transpose(1, 2), idx[:, 1:], reduction="none"))
        losses = {kind: torch.cat(parts).double() for kind, parts in losses.items()}
        spans = {f"{begin}..{begin + T - 1}": slice(begin, begin + T) for begin in range(0, 8 * T, T)}
        for name, span in (spans | {f"all {windows[:, 1:].numel():,}": slice(None)}).items():
            means = {kind: losses[kind][:, span].mean().item() if kind in losses else "-" for kind in KINDS}
            rows.append({"run": str(out_dir), "positions": name} | means)
    write("context", rows, args)
