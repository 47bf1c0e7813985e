"""The loss of a run on held-out text."""

import math
from contextlib import contextmanager

import numpy as np
import torch

from common import RANK, WORLD
from training import taumode
from training.batches import to_device
from training.processes import summed


def validation_starts(corpus, settings, T):
    """Where the windows of every validation begin: eval_iters * batch_size of them, or as many as val.bin has."""
    count = min(settings.eval_iters * settings.batch_size, (len(corpus.val) - 1) // T)
    return np.linspace(0, len(corpus.val) - 1 - T, count).astype(int)


@contextmanager
def averaged(run):
    """Inside the block the weights are replaced by their running mean, if the run keeps one."""

    def swap():
        for weight, mean in zip(run.raw_model.parameters(), run.ema or ()):
            held = weight.detach().clone()
            weight.data.copy_(mean)
            mean.copy_(held)

    swap()
    yield
    swap()


@torch.no_grad()
def validate(run):
    """(mean loss over the validation windows, nats per token; block 0's key energies (B, T, Hkv) on the first of them, None for
    dot). Collective."""
    total, E, B = 0.0, None, run.settings.batch_size
    for at in range(0, len(run.windows), WORLD * B):
        starts = run.windows[at + RANK * B :][:B]
        idx, targets = to_device(run.corpus.batch(starts if len(starts) else run.windows[:1], run.T, "val"), run.device)
        with run.autocast(), run.raw_model.recording() as seen:
            total += run.raw_model(idx, targets).item() * len(starts)
        E = seen[0].E_k if seen and E is None else E
    return summed([total], run.device)[0] / len(run.windows), E


def validation_record(run):
    """Validate; returns the line for metrics.jsonl. Collective."""
    with averaged(run):
        loss, E = validate(run)
    record = {
        "step": run.state.step,
        "tokens": run.state.tokens,
        "split": "val",
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": run.corpus.bits_per_byte(loss),
    }
    if E is not None:
        percentiles = np.percentile(E.cpu().numpy(), (5, 50, 95))
        record |= {"tau": taumode.tau_of(run.raw_model)[0].median().item()}
        record |= dict(zip(("E_p05", "E_p50", "E_p95"), percentiles.tolist()))
    return record


def shown(record):
    return f"validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.1f}, bits per byte {record['bits_per_byte']:.3f}"
