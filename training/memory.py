"""How much memory a training step needs, which batch fits, and how a run without enough memory ends."""

from contextlib import contextmanager
from dataclasses import replace

import torch

from common import WORLD, first_line, peak_rss_mb
from ops.fused import LOSS_CHUNK
from training import optim


@contextmanager
def memory_errors_named(settings):
    """Out of memory ends the run with one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise SystemExit(
            f"train.py: out of memory: lower batch_size = {settings.batch_size} (and raise grad_accum_steps = "
            f"{settings.grad_accum_steps} in its place), or block_size = {settings.block_size} "
            f"({first_line(error)})"
        ) from None


def kept_a_sequence(model, idx, targets):
    """Bytes that one more sequence keeps for the backward pass: those of two sequences minus those of one. idx, targets: (1, T)."""

    def kept(sequences):
        sizes = {}

        def noted(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(noted, lambda x: x):
            _loss = model(idx.repeat(sequences, 1), targets.repeat(sequences, 1))  # while it lives, so do the saved tensors
        return sum(sizes.values())

    return kept(2) - kept(1)


def memory_needed(model, settings, sequence):
    """Bytes of a training step in which each sequence keeps `sequence` bytes for the backward pass: those, weights, gradients,
    optimizer state, running mean and logits, and a tenth more."""
    logits = 3 * max(LOSS_CHUNK, settings.batch_size * model.config.block_size / 32) * model.config.vocab_size
    weights = model.parameter_count() * (2 + optim.NUMBERS + bool(settings.ema_decay))
    return 1.1 * (4 * (weights + logits) + settings.batch_size * sequence)


def fitting(model, settings, sequence, gigabytes):
    """(batch_size, grad_accum_steps) with the same tokens per step and the largest batch that fits by memory_needed(), or None."""
    sequences = settings.batch_size * settings.grad_accum_steps
    for batch_size in range(sequences // WORLD, 0, -1):
        if (
            sequences % (batch_size * WORLD) == 0
            and memory_needed(model, replace(settings, batch_size=batch_size), sequence) <= gigabytes * 2**30
        ):
            return batch_size, sequences // batch_size
    return None


def peak_mem_mb(device):
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mb()
