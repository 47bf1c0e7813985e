"""A whole training step of the 30M model, as published and in its best form, of its dot-product twin and of nanoGPT's."""

import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.report import HEADS, LAYERS, TOKENS, VOCABULARY, WIDTH, in_own_process, write
from build_laplacian import random_distances
from common import ROOT, UserError
from data.laplacian import laplacian_of
from model import ModelConfig, ModelSettings, Tauformer
from training import optim
from training.config import read_settings
from training.memory import peak_mem_mb
from training.processes import compiled

CONFIGS = {  # file, and settings in place of its own
    "dot": ("dot_30m.toml", {}),
    "tau": ("tau_30m.toml", {}),
    "tau_best": ("tau_30m_best.toml", {}),
    "tau_best_without_recall": ("tau_30m_best.toml", {"recall_heads": 0}),
}
PEAK = 989e12  # operations a second of an H100 or H200 in bfloat16, without sparsity


def model_of(file, instead, T):
    """The model of a config, with other settings `instead` and contexts of T tokens; weights and Laplacian are random."""
    settings = read_settings(ROOT / "configs" / file) | instead
    config = ModelConfig(**{f.name: settings[f.name] for f in fields(ModelSettings) if f.name in settings} | {"block_size": T})
    return Tauformer(config, torch.from_numpy(laplacian_of(random_distances(WIDTH, seed=0))))


def train_step(contender, nanogpt, B, T, steps, compile, threads, device):
    """(seconds of a training step, median; peak memory in MB; weights in matrix products) of a 30M model, in a fresh process; on a GPU
    in bfloat16. Every model has its own optimiser's groups and kernel."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as train.py does, and nanoGPT's
    if contender == "nanogpt":
        sys.path.insert(0, nanogpt)
        sys.modules.pop("model")
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(block_size=T, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, dropout=0.0, bias=False))
        loss_of = lambda model, idx, targets: model(idx, targets)[1]
        optimizer = model.to(device).configure_optimizers(0.1, 1e-4, (0.9, 0.95), device)
    else:
        model = model_of(*CONFIGS[contender], T)
        loss_of = lambda model, idx, targets: model(idx, targets)
        optimizer = optim.adamw(model.to(device), 1e-4, (0.9, 0.95), weight_decay=0.1)
    run = compiled(model) if compile else model
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
    looked_up = model.transformer.wpe.weight if contender == "nanogpt" else model.embedding.weight  # nanoGPT's head is its embedding
    products = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2 and weight is not looked_up)
    return statistics.median(times[1:]), peak_mem_mb(torch.device(device)), products


def bench_train_step(args):
    on_gpu = args.device == "cuda"
    ours = [name for name in CONFIGS if not (on_gpu and name.endswith("without_recall"))]  # compiling takes a minute of it
    contenders = [*(["nanogpt"] if args.nanogpt else []), *ours]  # the first is what the others are compared with
    if args.nanogpt and not (Path(args.nanogpt) / "model.py").exists():
        raise UserError(f"--nanogpt={args.nanogpt}: there is no model.py; give a checkout of nanoGPT")
    name = "train_step" + ("_cuda" if on_gpu else "") + ("_compiled" if args.compile else "")
    rows, base = [], contenders[0]
    for T in [length for length in (1024, 16384, 4096) if length <= args.longest]:  # the ends first
        B = max(1, TOKENS[args.device] // T)
        measured = {contender: [] for contender in contenders}
        for contender in tqdm(args.repeats * contenders, desc=f"T = {T}", disable=None):
            result = in_own_process(
                train_step, contender, args.nanogpt, B, T, args.steps, args.compile, torch.get_num_threads(), args.device
            )
            measured[contender].append(result)
            if len(measured[contender]) < args.repeats:
                continue
            seconds, memory, products = (statistics.median(column) for column in zip(*measured[contender]))
            row = {
                "model": contender,
                "B": B,
                "T": T,
                "compile": args.compile,
                "step_s": seconds,
                "tokens_per_s": B * T / seconds,
                "memory_mb": memory,
                "runs": args.repeats,
            }
            if on_gpu:
                row["mfu"] = 6 * products * B * T / seconds / PEAK  # of matrix products alone, without attention
            rows.append(row)
            of_base = next(other for other in rows if (other["model"], other["T"]) == (base, T))
            row[f"speed_to_{base}"] = row["tokens_per_s"] / of_base["tokens_per_s"]
            row[f"memory_to_{base}"] = row["memory_mb"] / of_base["memory_mb"]
            write(name, rows, args)  # as it goes: the machine may be there for minutes
