"""The batches of a training step: which windows of the text they are, and on their way to the device."""

import functools

import numpy as np
import torch


def training_batch(corpus, settings, T, step, micro):
    """Windows of tokens, int64 (batch_size, T + 1), a function of (seed, step, micro) alone: the same for any number of
    processes, and after any resume."""
    if settings.sampling == "passes":
        windows = (len(corpus.train) - 1) // T
        first = (step * settings.grad_accum_steps + micro) * settings.batch_size
        starts = [
            T * window_order(settings.seed, number // windows, windows)[number % windows]
            for number in range(first, first + settings.batch_size)
        ]
    else:
        starts = np.random.default_rng([settings.seed, step, micro]).integers(0, len(corpus.train) - T, settings.batch_size)
    return corpus.batch(starts, T, "train")


@functools.lru_cache(maxsize=2)
def window_order(seed, number, windows):
    """The order of the windows in pass `number`, (windows,)."""
    return np.random.default_rng([seed, number]).permutation(windows)


def to_device(batch, device):
    """(idx, targets), each (B, T) int64 on the device, of a batch (B, T + 1)."""
    batch = torch.from_numpy(batch)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    else:
        batch = batch.to(device)
    return batch[:, :-1], batch[:, 1:]


def batch_of(run, step, micro):
    """(idx, targets), each (B, T), of a step's batch."""
    return to_device(training_batch(run.corpus, run.settings, run.T, step, micro), run.device)


def step_batches(run):
    """An iterator over the idx (B, T) of this process's batches of the next step."""
    return (batch_of(run, run.state.step, micro)[0] for micro in run.micro_batches)
