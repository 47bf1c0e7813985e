"""taumode: where tau, the scale of lambda = E / (E + tau), comes from and how it moves.

    fixed       the median energy of block 0's keys over the batch of the first step, kept (the published run)
    mean        the same, but their mean
    percentile  the same, but their tau_percentile-th percentile
    adaptive    starts as fixed; every tau_interval steps log tau moves by the fraction 1 - tau_smoothing towards the log of
                the median over the next step's batch
    gradient    starts as fixed; at a validation that is the best so far tau becomes the median over the next step's batch,
                if |log(median / tau)| > tau_drift for any layer and head
    learned     starts as fixed; log tau is a parameter per key head

tau_scope: global, block 0's tau for every layer and head (published), or head, a tau per layer and head from its own energies.
(Article "Training a 30M parameters Topological Transformer", 2026: fixed; it announces the next two.)"""

import torch

from ops.attention import finest
from ops.fused import ENERGY_EPS
from training.processes import gathered, placed, whole


def tau_of(model):
    """tau per layer and key head, (n_layer, Hkv) without the local heads; None for dot. Collective."""
    if model.config.attention == "dot":
        return None
    return torch.stack([whole(block.attention.log_tau.detach()).exp() for block in model.blocks])


@torch.no_grad()
def set_tau(model, tau):
    """tau: (n_layer, Hkv), positive. Collective."""
    for block, row in zip(model.blocks, tau):
        block.attention.log_tau.copy_(placed(row.log(), block.attention.log_tau))


def statistic(E, mode, percentile):
    """The statistic of E (..., N) over its last dimension that tau_mode asks for, in float64 where the device has it."""
    E = E.to(finest(E.device)).sort(-1)[0]  # so that the mean does not depend on the order either
    if mode == "mean":
        return E.mean(-1)
    return E[..., int((E.size(-1) - 1) * (percentile if mode == "percentile" else 50) / 100)]


@torch.no_grad()
def measured_tau(model, batches, settings):
    """tau (n_layer, Hkv) from the key energies on `batches`, tensors (B, T) of tokens, as many on every process; the
    energies of all processes count. Collective."""
    layers = model.config.n_layer if settings.tau_scope == "head" else 1
    E = []
    for idx in batches:
        with model.recording() as energies:
            model(idx, head=False)
        E.append(torch.stack([seen.E_k.flatten(0, 1).T for seen in energies[:layers]]))  # (layers, Hkv, B T)
    E = gathered(torch.cat(E, -1))
    if settings.tau_scope == "global":
        E = E.flatten()
    tau = statistic(E, settings.tau_mode, settings.tau_percentile).clamp_min(ENERGY_EPS)
    return tau.expand_as(tau_of(model))


def calibrate(model, batches, settings):
    """Set tau at the start of a run."""
    set_tau(model, measured_tau(model, batches, settings))


def adapt(model, batches, settings):
    """Move tau by the rule of "adaptive"."""
    theirs = measured_tau(model, batches, settings).log()
    ours = tau_of(model).to(theirs.dtype).log()
    set_tau(model, theirs.lerp(ours, settings.tau_smoothing).exp())


def follow(model, batches, settings):
    """Move tau by the rule of "gradient", after a validation that improved."""
    tau = measured_tau(model, batches, settings)
    if (tau / tau_of(model)).log().abs().max() > settings.tau_drift:
        set_tau(model, tau)
