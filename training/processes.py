"""The processes of a run, one or those that torchrun started, and the signals that they get. A function marked "Collective" must
be called by all of them."""

import gc
import math
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._functorch import config as functorch_config
from torch.nn.parallel import DistributedDataParallel

from common import RANK, RESTARTS, WORLD, UserError, note


@dataclass
class Signals:
    """What signals have asked this process for."""

    stop: bool = False
    save: bool = False
    since: float = math.inf  # when a stop was first asked for

    def heed(self):
        """From now on SIGTERM, SIGINT and SIGHUP ask to stop, SIGUSR1 to save. One of the first three, again a second later, ends the
        process at once."""
        signal.signal(signal.SIGTERM, self.asked_to_stop)
        signal.signal(signal.SIGINT, self.asked_to_stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, self.asked_to_stop)
        signal.signal(signal.SIGUSR1, self.asked_to_save)

    def asked_to_stop(self, number, frame):
        self.stop = True
        now = time.monotonic()
        if now > self.since + 1:  # the same one may come twice, from the terminal or scheduler and from torchrun
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.since = min(self.since, now)

    def asked_to_save(self, number, frame):
        self.save = True


def meet(device):
    if WORLD > 1:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE = {WORLD} is set, but not {', '.join(missing)}: start the processes with torchrun, or unset WORLD_SIZE"
            )
        if device.type not in ("cuda", "cpu"):
            raise UserError(f"several processes cannot train on {device.type}: start one, without torchrun, or give --device=cpu")
        store = next(dist.rendezvous("env://"))[0]
        store = dist.PrefixStore(f"{RESTARTS}", store)  # torchrun's store outlives a restart and holds addresses of processes that died
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK, world_size=WORLD)


def part():
    if dist.is_initialized():
        gc.collect()  # a DDP model in a reference cycle would keep the group, and gloo's threads abort if they outlive the interpreter
        dist.destroy_process_group()


def summed(values, device):
    """The sums over all processes of a list of numbers, as a list. Collective."""
    if WORLD == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def gathered(x):
    """x (..., N) of every process, concatenated along the last dimension in the order of ranks. Collective."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1)


def wrapped(model, device, shard, compile):
    """The model on its device, wrapped as the training step calls it. shard "ddp": every process holds the whole model;
    "fsdp": a part of every weight, which is gathered block by block when it is needed. Collective."""
    if shard == "fsdp" and WORLD > 1:
        from torch.distributed.fsdp import fully_shard  # here, because importing it takes a second

        mesh = dist.init_device_mesh(device.type, (WORLD,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)  # so that no gathered copy outlives an update of the weights
    model.to(device)
    if compile:
        note("compile = True: the model is compiled in its first step, which may take minutes ...")
    called = compiled(model) if compile and can_compile(device) else model
    if shard == "ddp" and WORLD > 1:
        called = DistributedDataParallel(called, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    return called


def compiled(model):
    """torch.compile(model), with gradients as without it: under autocast those of what is float32 are so too."""
    functorch_config.backward_pass_autocast = "off"
    return torch.compile(model)


def can_compile(device):
    """Whether torch.compile works here; what it lacks (a C++ compiler, triton) is said once."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # whatever the compilers below it raise
        said = next((line for line in reversed(str(error).splitlines()) if "rror" in line or "ompiler" in line), type(error).__name__)
        note(f"compile = True, but torch.compile does not work here ({said.strip()}): trained without it")
        return False


@contextmanager
def no_sync(model):
    """Inside the block backward() adds to this process's own gradients and does not average them over the processes."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def whole(x):
    """x as a whole tensor, gathered if it is sharded. Collective."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def placed(x, like):
    """The whole tensor x with the device, dtype and sharding of `like`. Collective."""
    x = x.to(like.device, like.dtype)
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements)
