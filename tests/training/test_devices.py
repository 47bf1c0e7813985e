"""Number formats and devices. float16 is run on a CPU, where torch has it too. No test here has seen a V100, a T4 or an Apple GPU: what
is said of those is tested with the answers of torch replaced, or by watching which numbers an operation makes."""

import contextlib
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, metrics, ok, untimed
from test_model import ALL, random_laplacian, small, tokens
from test_model import FORMS as EVERY_SWITCH
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops.attention
import ops.dot
import train
from common import UserError, choose_device
from data import checkpoint_file
from decoding.cache import Cache
from model import filtered_energy, spectral_roots
from ops.attention import Tree, doubled_sum, tau_attention
from ops.fused import ChunkedLoss
from training import checkpoint, optim, taumode
from training.checkpoint import RunState
from training.config import Settings
from training.diagnostics import diagnose
from training.processes import wrapped
from training.start import choose_dtype

SHORT = ["small.toml", "--n_layer=1", "--dropout=0.0", "--diag_interval=0", "--log_interval=1", "--eval_interval=100"]
FORMS = [dict(), dict(ALL), dict(attention="dot", forget="gate", key_bias=True, output_gate=True, conv=3)]


def gradients(model, idx, dtype, scale):
    with torch.autocast("cpu", dtype) if dtype is not torch.float32 else contextlib.nullcontext():
        loss = model(idx, idx.roll(-1, 1))
    return loss.item(), torch.autograd.grad(loss * scale, list(model.parameters()))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_in_float16(form):
    """Of a loss that is scaled as at the start of a run: those of float32, to float16's precision, and every one a float32."""
    model, idx = small(**form), tokens(T=24)
    for weight in model.parameters():
        weight.data *= 2
    loss, expected = gradients(model, idx, torch.float32, 1)
    half, scaled = gradients(model, idx, torch.float16, 2.0**16)
    assert half == pytest.approx(loss, abs=2e-2)
    for (name, weight), ours, theirs in zip(model.named_parameters(), scaled, expected):
        assert ours.dtype is torch.float32 and weight.shape == ours.shape, name
        error = (ours / 2.0**16 - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert error < 0.03, (name, error)


class Energies(torch.nn.Module):
    def __init__(self, laplacian):
        super().__init__()
        self.register_buffer("roots", spectral_roots(laplacian))
        self.log_filter = torch.nn.Parameter(torch.zeros(self.roots.shape[:2]))

    def forward(self, x):
        return filtered_energy(x, self.roots, self.log_filter).sum()


def test_compiled_energies_have_gradients_in_float32():
    """Under autocast, in which torch.compile by itself would put the backward pass too."""
    model, x = Energies(random_laplacian(16)[None]), torch.randn(1, 50, 1, 16, requires_grad=True)
    found = []
    for compile in (False, True):
        call = wrapped(model, torch.device("cpu"), "ddp", compile)
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x)
        found.append(torch.autograd.grad(loss, [x, model.log_filter]))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager, atol=1e-6 * eager.abs().max().item(), rtol=1e-5)


def test_the_scale_of_the_loss_does_not_pass_through_float16():
    """The chunked loss multiplies its gradients in float32: 2^20 is past float16."""
    x, weight = torch.randn(300, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True)
    targets, results = torch.randint(90, (300,)), []
    for scale in (1.0, 2.0**20):
        with torch.autocast("cpu", torch.float16):
            loss = ChunkedLoss.apply(x, weight, targets, 15.0, True)
        results.append([grad / scale for grad in torch.autograd.grad(loss * scale, (x, weight))])
    for one, scaled in zip(*results):
        assert scaled.dtype is torch.float32 and torch.equal(one, scaled)


@pytest.mark.parametrize("impl", ["naive", "walk", "tree"])
def test_attention_of_float16_values(impl):
    """It computes in float32, in the backward pass too, where gradients are scaled."""
    torch.manual_seed(0)
    q, k, v = torch.rand(1, 4, 100), torch.rand(1, 2, 100), torch.randn(1, 2, 100, 16).half()
    grad, results = (torch.randn(1, 4, 100, 16) * 1000).half(), []
    for values in (v, v.float()):
        arguments = [x.clone().requires_grad_() for x in (q, k, values)]
        with torch.autocast("cpu", torch.float16):
            out = tau_attention(*arguments, 0.05, impl=impl)
        results.append([out, *torch.autograd.grad(out, arguments, grad.to(out.dtype))])
    for half, single in zip(*results):
        assert half.isfinite().all() and torch.equal(half, single.to(half.dtype))


def test_a_float16_run(here):
    """Its losses are those of float32. Its scale and the steps since that last changed are in the checkpoint: broken off and resumed it is
    the same to the bit, also while gradients overflow, whose steps are left out and end nothing."""
    for name in ("float32", "float16"):
        ok("train.py", *SHORT, f"--dtype={name}", "--max_steps=4", f"--out_dir={name}", cwd=here)
    for half, single in zip(metrics(here / "float16"), metrics(here / "float32"), strict=True):
        assert half["loss"] == pytest.approx(single["loss"], abs=0.02) and half.get("skipped", 0) == 0
    tensors, header = checkpoint.read(here / "float16/step_00000004.safetensors")
    assert header["run"]["scaler"]["scale"] == 2.0**16 and header["run"]["scaler"]["_growth_tracker"] == 4
    header["run"]["scaler"]["scale"] = 2.0**32
    for name in ("whole", "broken"):
        (here / name).mkdir()
        path = here / name / "step_00000004.safetensors"
        checkpoint_file.save(path, tensors, {key: header[key] for key in checkpoint_file.HEADER})
    resume = [*SHORT, "--init_from=resume"]
    ok("train.py", *resume, "--out_dir=whole", "--max_steps=20", cwd=here)
    ok("train.py", *resume, "--out_dir=broken", "--max_steps=6", cwd=here)
    ok("train.py", *resume, "--out_dir=broken", "--max_steps=20", cwd=here)
    whole, broken = ([record for record in untimed(metrics(here / name)) if record["split"] == "train"] for name in ("whole", "broken"))
    assert whole == broken and len(whole) == 16
    skipped = whole[-1]["skipped"]
    assert 2 < skipped < 16 and [record["grad_norm"] is None for record in whole] == [True] * skipped + [False] * (16 - skipped)
    (ours, header), (theirs, other) = (checkpoint.read(here / name / "step_00000020.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and header["run"]["scaler"] == other["run"]["scaler"]
    assert header["run"]["scaler"]["scale"] == 2.0 ** (32 - skipped) and header["run"]["bad"] == 0
    assert "Infinity" not in (here / "whole/metrics.jsonl").read_text()


def test_endless_overflow_ends_the_run():
    settings, state = Settings(eval_only=True), RunState()
    run = SimpleNamespace(settings=settings, state=state, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    assert not train.is_good(run, 3.0, math.inf) and (state.skipped, state.bad) == (1, 0)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(SystemExit, match="step 1 is bad: loss 3, .* norm of the gradient inf, scale of the loss 1"):
        train.is_good(run, 3.0, math.inf)
    for loss, scaler in ((math.nan, run.scaler), (3.0, torch.amp.GradScaler("cpu", enabled=False))):  # these are bad as ever
        run.scaler, state.bad = scaler, 0
        with pytest.raises(SystemExit):
            train.is_good(run, loss, math.inf)


def test_float16_with_two_processes(here):
    """Batches are accumulated, and a step whose gradients overflow is left out by both."""
    ok("train.py", *SHORT, "--grad_accum_steps=4", "--dtype=float16", "--max_steps=3", "--out_dir=one", cwd=here)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, ROOT / "train.py", *SHORT, "--grad_accum_steps=4", "--dtype=float16", "--max_steps=3", "--out_dir=two"],
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(here / "one"), metrics(here / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-3)


def test_auto_by_the_answers_of_a_gpu_that_is_not_here(monkeypatch):
    """bfloat16 where the GPU computes in it; float16 on one that only emulates it, such as a V100 or T4; float32 elsewhere."""
    for own, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=own: own or including_emulation)
        assert choose_dtype("auto", torch.device("cuda")) is expected
        assert choose_dtype("float16", torch.device("cuda")) is torch.float16
    assert choose_dtype("auto", torch.device("cpu")) is choose_dtype("auto", torch.device("mps")) is torch.float32
    with pytest.raises(UserError, match="float16.*not mps"):
        choose_dtype("float16", torch.device("mps"))


def test_devices_by_the_answers_of_machines_that_are_not_here(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.ones(1))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(choose_device("auto")) == "mps" == str(choose_device("mps"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(UserError, match="'cuda' cannot be used here: torch finds no GPU, with CUDA_VISIBLE_DEVICES=''"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(choose_device(*args)) for args in (("auto",), ("cuda", 1), ("cuda:1",))] == ["cuda:0", "cuda:1", "cuda:1"]
    for args in (("cuda:7",), ("cuda", 2)):
        with pytest.raises(UserError, match="there are 2, from cuda:0 on"):
            choose_device(*args)


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:", "cuda:x", "", "0", "meta", "cuda", "cuda:7", "mps"])
def test_devices_that_are_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device '{name}' cannot be used here: ") as error:
        choose_device(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


class NoFloat64(TorchDispatchMode):
    """Inside the block no operation may make a float64, which an Apple GPU does not have."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert not any(torch.is_tensor(x) and x.dtype is torch.float64 for x in tree_leaves(out)), function
        return out


@pytest.fixture
def as_on_mps(monkeypatch):
    """The choices that are made on an Apple GPU, on the CPU."""
    for module in (ops.attention, ops.dot, taumode):
        monkeypatch.setattr(module, "finest", lambda device: torch.float32)
    monkeypatch.setattr(ops.attention, "fastest", lambda device, context: "naive")


@pytest.mark.parametrize("form", [*FORMS, dict(forget="slope", learn_temperature=True, tau_mode="learned")], ids=str)
def test_nothing_makes_a_float64_where_an_apple_gpu_could_not(form, as_on_mps):
    """A training step, tau, validation, diagnostics and decoding, watched on a CPU; not run on such a GPU."""
    model, idx = small(**form), tokens(T=24)
    optimizer = optim.optimizer_of(model, Settings())
    with NoFloat64():
        model(idx, idx).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model(idx, idx)
            cache = Cache(model.config)
            for start, stop in ((0, 20), (20, 21), (21, 24)):
                model(idx[:, start:stop], cache=cache)
        if model.config.attention == "tau":
            for mode in ("fixed", "mean", "percentile"):
                taumode.calibrate(model, [idx], Settings(tau_mode=mode))
            taumode.adapt(model, [idx], Settings())
            taumode.follow(model, [idx], Settings())
            json.dumps(diagnose(model, idx))
    assert all(x.dtype in (torch.float32, torch.int64) for x in (*model.parameters(), *model.buffers()))


def test_the_tree_makes_no_float64_of_float32():
    """It is what an Apple GPU takes for long contexts."""
    q, k, v = torch.rand(1, 4, 100), torch.rand(1, 2, 100), torch.randn(1, 2, 100, 16)
    more = torch.full((4,), 0.1), -torch.rand(1, 4, 100).cumsum(-1), torch.randn(1, 2, 100)
    with NoFloat64():
        results = Tree.forward(q, k, v, *more)
        grads = Tree.backward(torch.randn(1, 4, 100, 16), q, k, v, *more, *results)
    assert all(x.isfinite().all() for x in (*results, *grads))


class Refused(TorchDispatchMode):
    """Fails at what torch has no deterministic algorithm for on CUDA, by its list in use_deterministic_algorithms()."""

    NAMES = "cumsum put put_ histc bincount nll_loss_forward nll_loss2d_forward _embedding_bag reflection_pad1d".split()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        assert name not in self.NAMES or not args[0].is_floating_point(), function
        assert str(function) not in ("aten.median.dim", "aten.kthvalue.default"), function
        return function(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", EVERY_SWITCH, ids=str)
def test_deterministic_on_cuda_has_every_switch(form, deterministic, monkeypatch):
    """A training step, tau, validation and diagnostics, watched on a CPU, with the running sum that a GPU takes; not run on one."""
    model, idx = small(**form), tokens(T=24)
    expected = gradients(model, idx, torch.float32, 1)
    for module in (ops.attention, ops.dot):
        monkeypatch.setattr(module, "running_sum", doubled_sum)
    with Refused():
        ours = gradients(model, idx, torch.float32, 1)
        with torch.no_grad():
            model(idx, idx)
        if model.config.attention == "tau":
            for mode in ("fixed", "mean", "percentile"):
                taumode.calibrate(model, [idx], Settings(tau_mode=mode))
            diagnose(model, idx)
            taumode.tau_of(model)[0].median().item()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 2, 3, 64, 1000])
def test_running_sum_in_log_steps(T):
    x = torch.randn(2, 3, T, dtype=torch.float64, requires_grad=True)
    sums = doubled_sum(x), x.cumsum(-1)
    torch.testing.assert_close(*sums)
    weights = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x) for y in sums))
