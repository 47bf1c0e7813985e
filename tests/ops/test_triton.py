"""The GPU kernels, in Triton's interpreter or, where there is a CUDA device, on it: against the reference in float64."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton", reason="triton has no build for this system")
from test_attention import FACTORS, attended, inputs, pairwise, table_inputs, value_and_gradients

from ops import attention_grid, attention_triton, fused_triton, recurrence_triton
from ops.attention import backend, fast_attention, tau_attention
from ops.attention_triton import KEYS_BLOCK, QUERIES_BLOCK, TILES, reaches
from ops.recurrence import Doubling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.cuda] if DEVICE == "cuda" else []  # all of it, where there is one


@pytest.fixture(autouse=DEVICE == "cuda")
def one_tile():
    """On a GPU one tile of each kernel: to compile all of them takes minutes. New memory holds NaN then, which nothing may read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


NAMES = ("out", "lambda_q", "lambda_k", "v", "temperature", "log_decay", "key_bias", "sink")
SHORT = FACTORS | {"T": [1, 2, 63, 64, 65, 300, 512], "D": [16, 32, 64, 80, 128], "heads": [(1, 1), (1, 2), (2, 4)]}


def on_device(tensors):
    return [x if x is None else x.to(DEVICE) for x in tensors]


def untied_inputs(row):
    """Those of the table, on the device; lambdas that are not meant to be equal are not so by chance either."""
    lambda_q, lambda_k, *rest = table_inputs(**row)
    if row["lambdas"] in ("uniform", "one row far"):
        lambda_q, lambda_k = (lambda_q * 2**22).floor() / 2**22, ((lambda_k * 2**22).floor() + 0.5) / 2**22
    return [x if x is None else x.to(DEVICE) for x in (lambda_q, lambda_k, *rest)]


def mixed(inputs, impl, dtype):
    """out and gradients with values of dtype and all else float32, or float64 where dtype is."""
    lambda_q, lambda_k, v, *rest = [x if x is None else x.to(torch.promote_types(dtype, torch.float32)) for x in inputs]
    arguments = [x if x is None else x.detach().clone().requires_grad_() for x in (lambda_q, lambda_k, v.to(dtype), *rest)]
    out = attended(arguments, impl)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    assert out.dtype is dtype and arguments[2].grad.dtype is dtype
    return [out.detach(), *(None if x is None else x.grad for x in arguments)]


def logit(row):
    """The greatest distance, in temperatures."""
    return 1 / row["temperature"] + 1000 * (row["lambdas"] == "one row far")


def one_term(row, name):
    """About the size of one term of the sum that a result is: rounding shows where they cancel."""
    return {"lambda_q": 1 / row["temperature"], "lambda_k": 1 / row["temperature"], "temperature": logit(row) / row["temperature"]}.get(
        name, 1
    )


def expected_of(row, arguments):
    """The reference in float64; at a tie, where any subgradient of lambda is right, that of the other implementations."""
    impl = "tree" if row["lambdas"] in ("all equal", "half equal") else "naive"
    return value_and_gradients(arguments, impl, torch.float64)


@pytest.mark.parametrize("row", list(pairwise(SHORT)), ids=lambda row: "-".join(str(value) for value in row.values()))
def test_equals_reference(row, impl="triton"):
    inputs = untied_inputs(row)
    expected = expected_of(row, inputs)
    results = value_and_gradients(inputs, impl, torch.float32)
    tolerance = {name: 1e-5 + 2**-24 * logit(row) for name in NAMES} | {"temperature": 1e-3}  # float32 rounds logits
    if row["log_decay"] == "head":
        tolerance["log_decay"] = 1e-4  # sums T^2 / 2 lags
    for name, ours, theirs in zip(NAMES, results, expected, strict=True):
        if theirs is None:
            continue
        error, size = (ours - theirs).abs().max().item(), max(theirs.abs().max().item(), one_term(row, name))
        assert error <= tolerance[name] * size, (name, error, size)


@pytest.fixture
def few(monkeypatch):
    """Chunks of 64 tokens and 8 bins, so that short sequences have several of each, and a sample that is less than everything."""
    assert backend("grid") is attention_grid and backend("triton") is attention_triton
    monkeypatch.setattr(attention_grid, "sizes", lambda T: (64, 8))
    monkeypatch.setattr(attention_grid, "SAMPLE", 128)


GRID_ROWS = [row for row in pairwise(SHORT) if row["T"] >= 63 and row["D"] < 80][1::2] + [
    dict(T=1, D=16, heads=(1, 2), temperature=0.05, lambdas="uniform", log_decay="token", key_bias=True),
    dict(T=700, D=16, heads=(1, 2), temperature=0.001, lambdas="uniform", log_decay=None, key_bias=True),
    dict(T=200, D=16, heads=(2, 4), temperature=10.0, lambdas="uniform", log_decay="token", key_bias=False),
]


@pytest.mark.parametrize("row", GRID_ROWS, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_grid_equals_reference(row, few):
    test_equals_reference(row, "grid")


def test_grid_of_half_precision(few):
    row = dict(T=200, D=64, heads=(1, 2), temperature=0.02, lambdas="uniform", log_decay="token", key_bias=True)
    test_values_of_half_precision(row, torch.bfloat16, "grid")


def test_grid_same_bits_again(few):
    test_same_bits_again("grid")


@pytest.mark.parametrize("log_decay", [None, "token"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lambdas_as_far_apart_as_factors_go_and_farther(log_decay, dtype, tolerance):
    row = dict(T=130, D=16, heads=(2, 2), temperature=1 / 32, lambdas="uniform", log_decay=log_decay, key_bias=True)
    lambda_q, lambda_k, v, _, decay, bias, sink = untied_inputs(row)
    lambda_q[..., 0], lambda_k[..., 0], lambda_q[..., 100], lambda_k[..., 100] = 0, 1, 0.999, 0.001
    bias = (bias * 20).clamp(-10.9, 10.9)
    temperature = torch.tensor([1 / 31, 1 / 33], device=DEVICE)
    arguments = [lambda_q, lambda_k, v.to(dtype).float(), temperature, decay, bias, sink]
    for name, ours, theirs in zip(NAMES, mixed(arguments, "triton", dtype), mixed(arguments, "naive", torch.float64), strict=True):
        if theirs is not None and name != "temperature":
            error, size = (ours.double() - theirs).abs().max().item(), max(theirs.abs().max().item(), one_term(row, name))
            assert error <= tolerance * size, (name, error, size)


def test_same_bits_again(impl="triton"):
    arguments = table_inputs(100, 16, (1, 2), 0.05, "uniform", "token", True)
    once, again = (value_and_gradients(on_device(arguments), impl, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.skipif(DEVICE == "cuda", reason="tiles are tuned there")
@pytest.mark.parametrize("tile", [(64, 32), (32, 64), (128, 64)])
def test_other_tiles(tile, monkeypatch):
    row = dict(T=300, D=16, heads=(1, 2), temperature=0.05, lambdas="uniform", log_decay="token", key_bias=True)
    inputs = untied_inputs(row)
    before = value_and_gradients(inputs, "triton", torch.float32)
    monkeypatch.setattr(attention_triton, "INTERPRETED_TILE", dict(zip("MN", tile)))
    for name, ours, theirs in zip(NAMES, value_and_gradients(inputs, "triton", torch.float32), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="in the interpreter the autotuner can only run if it has nothing to choose")
@pytest.mark.parametrize("impl", ["triton", "grid"])
def test_tiles_are_fixed_where_it_is_to_be_deterministic(impl, few, monkeypatch):
    """As many tiles as there are, or the first: with that the autotuner itself runs. New memory holds NaN then, which nothing may read."""
    arguments = untied_inputs(dict(T=100, D=16, heads=(1, 2), temperature=0.05, lambdas="uniform", log_decay="token", key_bias=True))
    expected = value_and_gradients(arguments, impl, torch.float32)
    with monkeypatch.context() as patch:
        for module in (attention_triton, attention_grid, fused_triton):
            patch.setattr(module, "INTERPRETED", False)
        launchers = {(attention_triton, "launch_sums"): attention_triton.launcher()}
        for name, tiles in ("bins", attention_grid.PAIRS), ("grid", attention_grid.PAIRS), ("sums", attention_grid.SUMS):
            kernel = getattr(attention_grid, name.removesuffix("s") + "_kernel")
            launchers[attention_grid, f"launch_{name}"] = attention_grid.launcher(kernel, tiles)
        launchers[fused_triton, "launcher"] = fused_triton.launcher.__wrapped__(True)
    torch.use_deterministic_algorithms(True)
    try:
        for (module, name), launch in launchers.items():
            tuned = launch.tuner
            tuned.nargs = {}
            assert tuned.prune_configs({}) == tuned.configs[:1] and len(tuned.configs) > 1
            if module is not fused_triton:
                monkeypatch.setattr(module, name, launch)
        first, again = (value_and_gradients(arguments, impl, torch.float32) for _ in range(2))  # tuned, and looked up
    finally:
        torch.use_deterministic_algorithms(False)
    assert tuned.prune_configs({}) == tuned.configs
    for ours, same, theirs in zip(first, again, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-3)
        assert torch.equal(ours, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "row", [row for row in pairwise(SHORT) if row["T"] >= 63][::5], ids=lambda row: "-".join(str(value) for value in row.values())
)
def test_values_of_half_precision(row, dtype, impl="triton"):
    lambda_q, lambda_k, v, *rest = untied_inputs(row)
    inputs = [lambda_q, lambda_k, v.to(dtype).float(), *rest]
    for name, ours, theirs in zip(NAMES, mixed(inputs, impl, dtype), mixed(inputs, "naive", torch.float64), strict=True):
        if theirs is None or name == "temperature" or row["lambdas"] in ("all equal", "half equal") and name.startswith("lambda"):
            continue
        error, size = (ours.double() - theirs).abs().max().item(), max(theirs.abs().max().item(), one_term(row, name))
        assert error <= 2e-2 * size, (name, error, size)


def test_what_has_decayed_is_left_out_and_nothing_else():
    lambda_q, lambda_k, v, temperature, decay, bias, _ = table_inputs(512, 16, (1, 2), 0.05, "uniform", "token", True)
    temperature, decay, bias = temperature.double(), decay.double().cumsum(-1), bias.double()
    oldest, newest = reaches(lambda_q, lambda_k, temperature, decay, bias)
    assert oldest.max() > 300 and newest.min() < 200
    i = torch.arange(512)
    seen = (i >= oldest[..., None]) & (i <= i[:, None])  # (B, H, query, key)
    assert torch.equal(seen, ((i <= newest[..., None]) & (i >= i[:, None])).transpose(2, 3))
    logits = decay[..., :, None] - decay[..., None, :] + bias[..., None, :] - (lambda_q[..., None] - lambda_k[..., None, :]).abs() / 0.05
    own = logits.diagonal(dim1=2, dim2=3)[..., None]
    assert not ((logits > own - 40) & ~seen & (i <= i[:, None])).any()


def test_operator_keeps_torchs_rules():
    q, k, v, temperature, decay, bias = on_device(inputs(T=70))
    arguments = [x.requires_grad_() for x in (q.float(), k.float(), v.float(), temperature, decay.cumsum(-1).detach(), bias)]
    torch.library.opcheck(fast_attention, (*arguments, None, "triton"))


def test_refusals():
    q, k, v, *_ = on_device(inputs(T=10, dtype=torch.float32))
    with pytest.raises(ValueError, match="129"):
        tau_attention(q, k, v.new_zeros(*v.shape[:3], 129), 1.0, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        tau_attention(q, k, v.double(), 1.0, impl="triton")
    code = (
        "import sys, torch; sys.modules.update({'triton': None} if sys.argv[1] == 'absent' else {}); from ops import attention;"
        "q = torch.rand(1, 1, 8); attention.tau_attention(q, q, q[..., None], 1.0, impl='triton')"
    )
    for how, expected in (("absent", "package triton"), ("there", "CUDA device")):
        done = subprocess.run(
            [sys.executable, "-c", code, how],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert "ValueError: impl='triton' needs" in done.stderr and expected in done.stderr


def test_every_kernel_has_been_compiled_with_every_tile():
    """bench.py triton wrote down what each took; here each is compiled again, the sums with their first tile, with and without decay."""
    rows = json.loads((ROOT / "results" / "triton_resources.json").read_text())["rows"]
    compiled = {
        (row["tile"], row["warps"], row["stages"], row["backward"], row["capability"])
        for row in rows
        if row["kernel"] == "sums_kernel" and row["decay_and_bias"]
    }
    assert compiled == {
        (f"{M} x {N}", warps, stages, backward, capability)
        for M, N, warps, stages, _ in TILES
        for backward in (False, True)
        for capability in (8.0, 9.0)
    }
    code = "import sys; from benchmarks.kernels import kernel_resources; print(*map(kernel_resources, eval(sys.argv[1])), sep='\\n')"
    every = [("sums_kernel", TILES[0], 64, "bf16", terms, backward, 90) for terms in (False, True) for backward in (False, True)]
    every += [
        ("key_kernel", (KEYS_BLOCK, 1, 4, 3, None), 0, "bf16", True, False, 90),
        ("query_kernel", (QUERIES_BLOCK, 1, 4, 3, None), 64, "bf16", True, True, 90),
        *[
            (f"{name}_kernel", (64, 32, 4, 2, None), 64, "bf16", True, backward, 90)
            for name in ("bin", "sum", "grid")
            for backward in (False, True)
        ],
        ("recurrence_kernel", (recurrence_triton.ROWS, 1, 1, 3, None), 32, "fp32", False, False, 90),
        ("recurrence_gradient_kernel", (recurrence_triton.ROWS, 1, 1, 3, None), 32, "fp32", False, True, 80),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, repr(every)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0 and done.stdout.count("'registers'") == len(every), done.stderr


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("N, V, softcap, block", [(1, 257, 15.0, 64), (70, 300, 15.0, 128), (33, 64, 0.0, 64), (5, 9000, 3.0, 8192)])
def test_loss(N, V, softcap, block, dtype, tolerance, monkeypatch):
    """The kernel's loss and gradients against float64; columns that pad the vocabulary count for nothing."""
    monkeypatch.setattr(fused_triton, "BLOCK", block)
    monkeypatch.setattr(fused_triton, "MOST", 512)  # longer rows go in blocks
    fused_triton.launcher.cache_clear()
    monkeypatch.setattr(fused_triton, "CHUNK", 32)
    torch.manual_seed(0)
    x, weight, targets = (part.to(DEVICE) for part in (2 * torch.randn(N, 16), torch.randn(V, 16), torch.randint(V, (N,))))
    exact = [part.to(dtype).double().requires_grad_() for part in (x, weight)]
    z = exact[0] @ exact[1].T
    expected = torch.nn.functional.cross_entropy(softcap * torch.tanh(z / softcap) if softcap else z, targets, reduction="sum")
    grads = torch.autograd.grad(expected / (4 if softcap else 1), exact)
    ours = fused_triton.summed_loss(x, weight, targets, softcap, True, dtype)
    for name, mine, theirs in zip(("loss", "x", "weight"), ours, (expected.detach(), *grads), strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= tolerance * theirs.norm(), name
    assert fused_triton.summed_loss(x, weight, targets, softcap, False, dtype)[0] == ours[0]


@pytest.mark.parametrize("shape", [(2, 77, 3, 5), (1, 1, 1, 32), (1, 8, 2, 32), (2, 16, 1, 16), (1, 33, 6, 64)], ids=str)
def test_recurrence_equals_the_plain_one(shape):
    torch.manual_seed(0)
    a, b, grad = (x.to(DEVICE) for x in (torch.rand(*shape[:3], 1), torch.randn(shape), torch.randn(shape)))
    y = recurrence_triton.recurrence(a, b)
    expected = Doubling.recurrence(a.double(), b.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = Doubling.recurrence_backward(grad.double(), a.double(), expected)
    for ours, theirs in zip(recurrence_triton.recurrence_backward(grad, a, y), gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
