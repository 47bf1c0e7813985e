import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from ops.attention import compiled, fast_attention, tau_attention


def by_definition(lambda_q, lambda_k, v, temperature, log_decay, key_bias):
    """The formula of the doc-string, one number at a time."""
    (B, H, T), Hkv = lambda_q.shape, v.shape[1]
    out = torch.zeros(B, H, T, v.shape[-1], dtype=v.dtype)
    for b in range(B):
        for h in range(H):
            g = h // (H // Hkv)
            for i in range(T):
                logits = [
                    -abs(lambda_q[b, h, i] - lambda_k[b, g, j]) / temperature[h] + key_bias[b, g, j] + sum(log_decay[b, h, j + 1 : i + 1])
                    for j in range(i + 1)
                ]
                weights = [math.exp(logit) for logit in logits]
                for j, weight in enumerate(weights):
                    out[b, h, i] += weight / sum(weights) * v[b, g, j]
    return out


def inputs(B=2, H=4, Hkv=2, T=7, D=3, dtype=torch.float64):
    torch.manual_seed(0)
    return (
        torch.rand(B, H, T, dtype=dtype),
        torch.rand(B, Hkv, T, dtype=dtype),
        torch.randn(B, Hkv, T, D, dtype=dtype),
        torch.rand(H, dtype=dtype) + 0.1,
        -torch.rand(B, H, T, dtype=dtype),
        torch.randn(B, Hkv, T, dtype=dtype),
    )


def test_formula():
    torch.testing.assert_close(tau_attention(*inputs()), by_definition(*inputs()))


def test_gradients():
    tensors = [tensor.requires_grad_() for tensor in inputs(T=5)]
    torch.autograd.gradcheck(lambda *t: tau_attention(*t), tensors)


def test_decay_of_a_head_is_the_same_at_every_step():
    q, k, v, temperature, _, bias = inputs()
    slope = -torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close(
        tau_attention(q, k, v, temperature, slope, bias), tau_attention(q, k, v, temperature, slope[:, None].expand(2, 4, 7), bias)
    )


def test_last_queries_only():
    q, k, v, *rest = inputs()
    torch.testing.assert_close(tau_attention(q[..., -2:], k, v, *rest), tau_attention(q, k, v, *rest)[..., -2:, :])


def test_causal():
    q, k, v, temperature, decay, bias = inputs()
    before = tau_attention(q, k, v, temperature, decay, bias)
    for tensor in (q, k, decay, bias):
        tensor[..., 4] += 0.3
    v[:, :, 4] += 1
    after = tau_attention(q, k, v, temperature, decay, bias)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert all(not torch.isclose(before[:, :, t], after[:, :, t]).all() for t in (4, 5, 6))


def test_values_keep_their_dtype():
    q, k, v, *_ = inputs(dtype=torch.float32)
    assert tau_attention(q, k, v.bfloat16(), 1.0).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        dict(lambda_k=torch.zeros(2, 2, 6)),
        dict(lambda_q=torch.zeros(2, 3, 7)),
        dict(impl="fast"),
        dict(lambda_q=torch.zeros(2, 4, 3), impl="walk"),
    ],
)
def test_refusals(change):
    q, k, v, *_ = inputs(dtype=torch.float32)
    with pytest.raises(ValueError):
        tau_attention(**{"lambda_q": q, "lambda_k": k, "v": v, "temperature": 1.0, **change})


# The fast implementations, in float32, against the reference in float64.

FACTORS = {
    "T": [1, 2, 63, 64, 65, 500, 777, 1024, 4096],
    "D": [16, 32, 64, 80],
    "heads": [(1, 1), (1, 2), (1, 6)],  # keys, queries
    "temperature": [1e-3, 0.05, 1.0, 10.0],
    "lambdas": ["uniform", "all equal", "half equal", "one row far"],
    "log_decay": [None, "head", "token", "vanishing"],
    "key_bias": [False, True],
}


def pairwise(factors):
    """Rows of the table in which any two values of any two columns meet."""
    generator, names = random.Random(0), list(factors)
    missing = {
        (a, x, b, y) for i, a in enumerate(names) for b in names[i + 1 :] for x in range(len(factors[a])) for y in range(len(factors[b]))
    }
    while missing:
        candidates = [{name: generator.randrange(len(values)) for name, values in factors.items()} for _ in range(200)]
        met = lambda row: {pair for pair in missing if row[pair[0]] == pair[1] and row[pair[2]] == pair[3]}
        best = max(candidates, key=lambda row: len(met(row)))
        missing -= met(best)
        yield {name: factors[name][index] for name, index in best.items()}


def table_inputs(T, D, heads, temperature, lambdas, log_decay, key_bias):
    generator = torch.Generator().manual_seed(T + D)
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    (Hkv, H), B = heads, 1 if T > 1000 else 2
    lambda_q, lambda_k = rand(B, H, T), rand(B, Hkv, T)
    if lambdas == "all equal":
        lambda_q[:], lambda_k[:] = 0.5, 0.5
    if lambdas == "half equal":
        lambda_q[..., ::2], lambda_k[..., ::2] = 0.5, 0.5
    if lambdas == "one row far":  # its nearest key is 1,000 temperatures away
        lambda_q[..., T // 2] = 1 + 1000 * temperature
    decay = {None: None, "head": -0.1 * rand(H), "token": -rand(B, H, T), "vanishing": -500.0 * (rand(B, H, T) < 0.05)}[log_decay]
    return [
        lambda_q,
        lambda_k,
        torch.randn(B, Hkv, T, D, generator=generator),
        torch.full((H,), temperature),
        decay,
        torch.randn(B, Hkv, T, generator=generator) if key_bias else None,
        torch.linspace(-6, 2, H) if key_bias else None,  # a sink; no factor of its own, lest the table grow
    ]


def attended(inputs, impl):
    *inputs, sink = inputs
    return tau_attention(*inputs, impl=impl, sink=sink)


def value_and_gradients(inputs, impl, dtype):
    inputs = [tensor.to(dtype, copy=True).requires_grad_() if tensor is not None else None for tensor in inputs]
    out = attended(inputs, impl)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    return [out.detach(), *(tensor.grad if tensor is not None else None for tensor in inputs)]


@pytest.mark.parametrize("row", list(pairwise(FACTORS)), ids=lambda row: "-".join(str(value) for value in row.values()))
def test_fast_equals_reference(row):
    inputs = table_inputs(**row)
    expected = value_and_gradients(inputs, "naive", torch.float64)
    for impl, tolerance in (("walk", 1e-5), ("tree", 2e-4)):
        results = value_and_gradients(inputs, impl, torch.float32)
        for name, ours, theirs in zip(
            ("out", "lambda_q", "lambda_k", "v", "temperature", "log_decay", "key_bias", "sink"), results, expected, strict=True
        ):
            if theirs is None or row["lambdas"] in ("all equal", "half equal") and name in ("lambda_q", "lambda_k", "temperature"):
                continue  # at a tie any subgradient is right
            assert ours.isfinite().all(), (impl, name)
            least = 1e-2 / row["temperature"] if name.startswith("lambda") else 1e-3  # where the gradient is 0
            if name == "log_decay" and row["key_bias"]:
                least = 1e-2  # with a sink it is a difference of two terms, which may cancel
            bound = (1e-3 if name == "temperature" else tolerance) * max(theirs.abs().max().item(), least)
            assert (ours - theirs).abs().max().item() <= bound, (impl, name)


@pytest.mark.parametrize("impl", ["walk", "tree"])
def test_fast_gradients_in_float64(impl):
    tensors = [tensor.requires_grad_() for tensor in inputs(B=1, H=2, Hkv=1, T=70, D=2)]
    torch.autograd.gradcheck(lambda *t: tau_attention(*t, impl=impl), tensors, fast_mode=True)


@pytest.mark.parametrize("impl", ["walk", "tree"])
def test_operator_keeps_torchs_rules(impl):
    q, k, v, temperature, decay, bias = inputs(T=70)
    arguments = [tensor.requires_grad_() for tensor in (q, k, v, temperature, decay.cumsum(-1).detach(), bias)]
    torch.library.opcheck(fast_attention, (*arguments, torch.randn(len(temperature), dtype=torch.float64).requires_grad_(), impl))


@pytest.mark.parametrize("impl", ["naive", "walk", "tree"])
@pytest.mark.parametrize("T", [100, 777])
def test_causal_bit_for_bit(impl, T):
    arguments = inputs(B=1, T=T, D=16, dtype=torch.float32)
    before = tau_attention(*arguments, impl=impl)
    for t in (1, T // 2, T - 1):
        changed = [tensor.clone() for tensor in arguments]
        for index in (0, 1, 4, 5):
            changed[index][..., t] -= 0.3
        changed[2][:, :, t] += 1
        after = tau_attention(*changed, impl=impl)
        assert torch.equal(before[:, :, :t], after[:, :, :t])


@pytest.mark.parametrize("impl", ["naive", "walk", "tree"])
def test_the_authors_synthetic_tasks(impl):
    """At temperature 1e-3, lambdas given: a query finds the key of its own lambda, wherever it stands."""
    generator, T, symbols = torch.Generator().manual_seed(0), 300, 16
    values = torch.randint(symbols, (T,), generator=generator)

    def solve(lambda_q, lambda_k):
        v = torch.nn.functional.one_hot(values, symbols).float()[None, None]
        return tau_attention(lambda_q[None, None], lambda_k[None, None], v, 1e-3, impl=impl)[0, 0].argmax(-1)

    noise = torch.rand(T, generator=generator) * 0.4  # nothing is looked for below 0.5
    # selective copy: the last 20 tokens ask for 20 marked ones, in order
    marked = torch.randperm(T - 20, generator=generator)[:20].sort()[0]
    lambda_k, lambda_q = noise.clone(), noise.clone()
    lambda_k[marked] = lambda_q[-20:] = torch.linspace(0.5, 0.95, 20)
    assert torch.equal(solve(lambda_q, lambda_k)[-20:], values[marked])
    # key-value recall: every key asked for at random
    keys = torch.linspace(0.05, 0.95, T // 2)[torch.randperm(T // 2, generator=generator)]
    asked = torch.randint(T // 2, (T // 2,), generator=generator)
    lambda_k, lambda_q = torch.cat([keys, torch.zeros(T // 2)]), torch.cat([keys, keys[asked]])
    assert torch.equal(solve(lambda_q, lambda_k)[T // 2 :], values[asked])
    # needle: one among all others
    lambda_k, lambda_q = noise.clone(), noise.clone()
    lambda_k[37] = lambda_q[-1] = 0.9
    assert solve(lambda_q, lambda_k)[-1] == values[37]
    # induction: what followed this token the last time; a key is the token before, a query the token itself
    values = torch.arange(T) % 13
    token = values / 13 + 0.01
    lambda_q, lambda_k = token, torch.cat([torch.zeros(1), token[:-1]])
    assert torch.equal(solve(lambda_q, lambda_k)[20:], (values[20:] + 1) % 13)


@pytest.mark.parametrize("impl", ["naive", "walk", "tree"])
def test_autocast_computes_in_float32(impl):
    q, k, v, *_ = inputs(T=100, D=16, dtype=torch.float32)
    v = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = tau_attention(q, k, v, 1.0, impl=impl)
    assert out.dtype is torch.bfloat16 and torch.equal(out, tau_attention(q, k, v.float(), 1.0, impl=impl).bfloat16())


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=torch.ones(5)),
        dict(log_decay=torch.zeros(1, 2, 3)),
        dict(key_bias=torch.zeros(1, 2)),
        dict(v=torch.zeros(1, 8, 4)),
        dict(lambda_k=torch.zeros(1, 2, 7)),
        dict(temperature=0.0),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(wrong):
    right = dict(lambda_q=torch.zeros(1, 2, 8), lambda_k=torch.zeros(1, 2, 8), v=torch.zeros(1, 2, 8, 4), temperature=1.0)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tau_attention(**right | wrong)


@pytest.mark.parametrize("impl", ["naive", "walk", "tree"])
def test_not_finite(impl):
    q, k, v, *_ = inputs(T=100, dtype=torch.float32)
    q[0, 0, 5] = float("nan")
    k[0, 0, 6] = float("inf")
    assert tau_attention(q, k, v, 1.0, impl=impl).shape == (2, 4, 100, 3)  # no hang
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match="lambda_q holds NaN"):
        tau_attention(q, k, v, 1.0, impl=impl)


@pytest.mark.parametrize("threads", [1, 2])
def test_walk_does_not_depend_on_its_threads(threads):
    """One head: threads share its levels; more: its heads."""
    for heads in ((1, 1), (2, 4)):
        arguments = table_inputs(9001, 16, heads, 0.05, "uniform", "token", True)
        expected = value_and_gradients(arguments, "walk", torch.float32)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results = value_and_gradients(arguments, "walk", torch.float32)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected))


def test_a_process_killed_while_it_compiled_does_not_hold_up_others(tmp_path, monkeypatch):
    """And what is compiled is not compiled again for the same file elsewhere."""
    source = tmp_path / "tiny.cpp"
    source.write_text(
        "#include <torch/library.h>\nint64_t half(int64_t x) { return x / 2; }\n"
        'TORCH_LIBRARY(tauformer_tiny, library) { library.def("half(int x) -> int", &half); }\n'
    )
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with monkeypatch.context() as killed:
        killed.setattr("torch.utils.cpp_extension.load", lambda *args, build_directory, **more: (Path(build_directory) / "lock").touch())
        compiled(source, "tauformer_tiny")
    (lock,) = tmp_path.glob("*/lock")
    (lock.parent / f"{lock.parent.name}.so").write_bytes(b"\x7fELF, half")
    assert compiled(source, "tauformer_tiny").half(6) == 3
    source = source.rename(tmp_path / "moved.cpp")
    monkeypatch.setattr("torch.utils.cpp_extension.load", None)
    assert compiled(source, "tauformer_tiny").half(6) == 3


def test_without_a_compiler_the_fallback_is_announced(tmp_path):
    code = (
        "import torch; from ops import attention; q = torch.rand(1, 1, 300); v = torch.rand(1, 1, 300, 8);"
        "assert torch.allclose(attention.tau_attention(q, q, v, 1.0), attention.tau_attention(q, q, v, 1.0, impl='naive'), atol=1e-5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "tree (attention.cpp could not be compiled: there is no C++ compiler no-such-compiler)" in done.stderr


@pytest.mark.cuda
def test_tree_on_cuda():
    arguments = table_inputs(777, 64, (1, 2), 0.05, "uniform", "token", True)
    expected = value_and_gradients(arguments, "naive", torch.float64)
    results = value_and_gradients([tensor.cuda() for tensor in arguments], "tree", torch.float32)
    for ours, theirs in zip(results, expected):
        torch.testing.assert_close(ours.cpu().double(), theirs, atol=2e-4 * theirs.abs().max().item(), rtol=0)
