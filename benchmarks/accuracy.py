"""What the fast implementations cost in accuracy: 200 steps by each of them, and lambda in fewer bits."""

import functools
import itertools
import json
import tempfile

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.report import in_own_process, write
from common import ROOT
from data.corpus import Corpus
from model import ModelConfig, Tauformer
from ops.attention import tau_attention
from train import train
from training import optim, taumode
from training.batches import step_batches, to_device, training_batch
from training.config import Settings, model_settings, read_settings
from training.processes import Signals
from training.start import domain_laplacian, start

CURVES = [
    ("naive", "float32", False),
    ("naive", "float32", True),
    ("walk", "float32", False),
    ("tree", "float32", False),
    ("naive", "float64", False),
    ("walk", "float64", False),
    ("tree", "float64", False),
]


def bench_curves(args):
    """How far the training losses of 200 steps of the quick start are from those of the dense reference, and, for scale,
    how far those are when one weight matrix starts one rounding error, 1e-7, away."""
    settings = Settings(**read_settings(ROOT / "configs" / "quickstart_published.toml"))
    settings.laplacian = f"{settings.data_dir}/laplacian.parquet"
    corpus, laplacian, curves, rows = Corpus(settings.data_dir), domain_laplacian(settings), {}, []
    for impl, dtype, moved in CURVES:
        torch.manual_seed(settings.seed)
        config = ModelConfig(vocab_size=corpus.vocab_size, **model_settings(settings) | {"dropout": 0.0})
        model = Tauformer(config, laplacian).to(getattr(torch, dtype))
        if moved:
            model.blocks[0].attention.query.weight.data.mul_(1 + 1e-7)
        for block in model.blocks:
            block.attention.operator = functools.partial(tau_attention, impl=impl)
        batch = lambda step: to_device(training_batch(corpus, settings, settings.block_size, step, 0), torch.device("cpu"))
        taumode.calibrate(model, [batch(0)[0]], settings)
        optimizer = optim.optimizer_of(model, settings)
        losses = []
        for step in tqdm(range(200), desc=f"{impl}, {dtype}", disable=None):
            optim.set_learning_rate(optimizer, optim.learning_rate(settings, step, 1.0))
            loss = model(*batch(step))
            loss.backward()
            losses.append(loss.item())
            optim.clip_gradients(model, settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        curves[impl, dtype, moved] = torch.tensor(losses, dtype=torch.float64)
        reference = curves["naive", dtype, False]
        apart = (curves[impl, dtype, moved] - reference).abs()
        rows.append(
            {
                "impl": impl,
                "dtype": dtype,
                "moved": moved,
                "last_loss": losses[-1],
                "apart_at_most": f"{apart.max():.1e}",
                "relative": f"{(apart / reference).max():.1e}",
            }
        )
    write("curves", rows, args)


def as_bfloat16(x):
    return x.bfloat16().float()


def as_tf32(x):
    """x as a GPU's matrix products read float32 where TF32 is allowed: 10 bits of mantissa, to nearest."""
    nearest = ((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x + (nearest - x).detach()


def round_lambdas(model, dtype):
    """Round the factors of the products that energies are made of: to TF32, or to bfloat16, and then the energies and the lambdas too.
    Sums stay float32, as in a GPU's products."""
    rounded = {"tf32": as_tf32, "bfloat16": as_bfloat16}[dtype]
    result = rounded if dtype == "bfloat16" else lambda x: x

    def round_of(attention):
        energies, lambdas = attention.energies, attention.lambdas
        attention.energies = lambda qk, laplacian, cache: result(energies(rounded(qk), rounded(laplacian), cache))
        attention.lambdas = lambda E: result(lambdas(E))

    for block in model.blocks:
        round_of(block.attention)
    key = model.recall.key
    key.forward = lambda tokens: F.linear(rounded(tokens), rounded(key.weight))


def quickstart(dtype, seed, threads):
    """Best validation loss of the quick start, in this process, with lambda in float32, as it is, or by products in TF32 or bfloat16."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        values = read_settings(ROOT / "configs" / "quickstart.toml") | {
            "seed": seed,
            "out_dir": f"{folder}/run",
            "results": f"{folder}/runs.jsonl",
        }
        settings = Settings(**values)
        settings.laplacian = f"{settings.data_dir}/laplacian.parquet"
        run = start(settings, dict.fromkeys(values, "benchmark"))
        if dtype != "float32":
            round_lambdas(run.raw_model, dtype)
            taumode.calibrate(run.raw_model, step_batches(run), settings)
        train(run, Signals())
        metrics = [json.loads(line) for line in run.logs[0].read_text().splitlines()]
    return min(row["loss"] for row in metrics if row["split"] == "val")


def bench_precision(args):
    """The quick start with energies and lambdas in float32, as they are, by products in TF32, and in bfloat16; all else is float32."""
    rows = []
    for seed, dtype in itertools.product((1, 2, 3), ("float32", "tf32", "bfloat16")):
        loss = in_own_process(quickstart, dtype, seed, torch.get_num_threads())
        rows.append({"lambda": dtype, "seed": seed, "val_loss": f"{loss:.4f}"})
        write("precision", rows, args)
