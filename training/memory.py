"""What a training step needs of memory, the batch that fits, and how a run ends that has too little."""

from contextlib import contextmanager
from dataclasses import replace

import torch

from common import WORLD, peak_rss_mb
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
            f"({str(error).splitlines()[0]})"
        ) from None


def kept_a_sequence(model, idx, targets):
    """Bytes that another sequence leaves for the backward pass: what two leave less what one does. idx, targets (1, T)."""

    def kept(sequences):
        sizes = {}

        def noted(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(noted, lambda x: x):
            _loss = model(idx.repeat(sequences, 1), targets.repeat(sequences, 1))  # as long as it lives, so do they
        return sum(sizes.values())

    return kept(2) - kept(1)


def memory_needed(model, settings, sequence):
    """Bytes of a training step of which each sequence leaves so many: with weights, gradients, what the optimizer keeps, the running
    mean and the logits, and a tenth more."""
    logits = 3 * max(LOSS_CHUNK, settings.batch_size * model.config.block_size / 32) * model.config.vocab_size
    weights = model.parameter_count() * (2 + optim.NUMBERS + bool(settings.ema_decay))
    return 1.1 * (4 * (weights + logits) + settings.batch_size * sequence)


def fitting(model, settings, sequence, gigabytes):
    """(batch_size, grad_accum_steps) for the same tokens a step with the greatest batch that memory_needed() lets in."""
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
