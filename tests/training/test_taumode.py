"""tau's strategies, and the diagnostics of the energies."""

import json
import math

import pytest
import torch
from conftest import fails, metrics, ok
from test_model import ALL, small, tokens
from test_train import TAU, last, weights

from ops.attention import attention_weights
from training import taumode
from training.config import Settings
from training.diagnostics import IN_A_ROW, collapses, diagnose


def energies(model, batches):
    """(layers, tokens, Hkv) of the keys."""
    recorded = []
    for idx in batches:
        with model.recording() as parts:
            model(idx)
        recorded.append(torch.stack([E_k.flatten(0, 1) for _, E_k, *_ in parts]))
    return torch.cat(recorded, 1)


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("fixed", lambda E: E.median()),
        ("mean", lambda E: E.mean()),
        ("percentile", lambda E: E.quantile(0.9)),
        ("adaptive", lambda E: E.median()),
        ("gradient", lambda E: E.median()),
        ("learned", lambda E: E.median()),
    ],
)
def test_start(mode, expected):
    model, batches = small(tau_mode=mode), [tokens(seed=1), tokens(seed=2)]
    E = energies(model, batches)
    taumode.calibrate(model, batches, Settings(tau_mode=mode, tau_percentile=90.0))
    tau = taumode.tau_of(model)
    assert tau.shape == (model.config.n_layer, model.config.n_kv_head)
    torch.testing.assert_close(tau, expected(E[0].flatten()).expand_as(tau), rtol=5e-3, atol=0)
    taumode.calibrate(model, batches, Settings(tau_mode=mode, tau_percentile=90.0, tau_scope="head"))
    torch.testing.assert_close(taumode.tau_of(model)[0, 1], expected(energies(model, batches)[0, :, 1]), rtol=3e-2, atol=0)
    assert len(taumode.tau_of(model).unique()) == tau.numel()


def test_adaptive_goes_a_share_of_the_way():
    model, batches = small(), [tokens()]
    taumode.set_tau(model, torch.full((2, 2), 100.0))
    median = energies(model, batches)[0].median().item()
    taumode.adapt(model, batches, Settings(tau_mode="adaptive", tau_smoothing=0.75))
    expected = math.exp(0.75 * math.log(100) + 0.25 * math.log(median))
    torch.testing.assert_close(taumode.tau_of(model), torch.full((2, 2), expected))


@pytest.mark.parametrize("drift, moves", [(0.05, False), (0.15, True)])
def test_gradient_moves_past_the_threshold(drift, moves):
    model, batches = small(), [tokens()]
    median = energies(model, batches)[0].median()
    taumode.set_tau(model, (median * math.exp(-drift)).expand(2, 2))
    before = taumode.tau_of(model)
    taumode.follow(model, batches, Settings(tau_mode="gradient", tau_drift=0.1))
    assert torch.equal(taumode.tau_of(model), before) != moves
    if moves:
        torch.testing.assert_close(taumode.tau_of(model), median.expand(2, 2))


def test_learned_tau_is_a_parameter_of_every_key_head():
    model = small(tau_mode="learned")
    loss = model(tokens(T=16), tokens(T=16, seed=3))
    loss.backward()
    for block in model.blocks:
        assert block.attention.log_tau.grad.shape == (2,) and (block.attention.log_tau.grad != 0).all()
    assert small().blocks[0].attention.log_tau.requires_grad is False


@pytest.mark.parametrize("mode", ["mean", "adaptive", "gradient", "learned"])
def test_modes_train(here, work, mode):
    ok(
        "train.py",
        "small.toml",
        f"--tau_mode={mode}",
        "--tau_interval=5",
        "--tau_drift=0.0",
        "--learning_rate=2e-2",
        f"--out_dir={mode}",
        cwd=here,
    )
    tau = [record["tau"] for record in metrics(here / mode) if record["split"] == "val"]
    assert (len(set(tau)) == 1) == (mode == "mean")
    assert tau[-1] == pytest.approx(last(here / mode)[TAU].exp().median().item(), rel=1e-6) or mode == "gradient"
    assert last(here / mode)[TAU].shape == (2,)
    learned = f"optimizer.exp_avg.{TAU.removeprefix('model.')}" in last(here / mode)
    assert learned == (mode == "learned")


def test_strategy_may_change_from_run_to_run(here, work):
    ok(
        "train.py",
        "small.toml",
        "--tau_mode=learned",
        "--tau_scope=head",
        f"--init_from={work}/out/small",
        "--max_steps=2",
        "--out_dir=l",
        cwd=here,
    )
    assert len(last(here / "l")[TAU].unique()) == 2
    ok("train.py", "small.toml", "--init_from=l", "--max_steps=2", "--out_dir=m", cwd=here)  # learned stays learned
    assert not torch.equal(last(here / "m")[TAU], weights(here / "l" / "best.safetensors")[TAU])


@pytest.mark.parametrize("form", [{}, ALL | dict(local_heads=0)], ids=str)
def test_diagnostics(form):
    model, idx = small(**form), tokens(B=2, T=24)
    taumode.calibrate(model, [idx], Settings())
    record = diagnose(model, idx)
    with model.recording() as recorded:
        model(idx)
    for layer, seen in enumerate(recorded):
        tau, E_q, E_k = taumode.tau_of(model)[layer], seen.E_q, seen.E_k
        lambda_q, lambda_k = E_q / (E_q + tau[0]), E_k / (E_k + tau[0])
        torch.testing.assert_close(seen.lambda_k, lambda_k.transpose(1, 2))
        if form:  # with recall heads, whose keys stand a token later
            torch.testing.assert_close(seen.lambda_k[:, -1, 1:], lambda_q[:, :-1, -1])
            p = attention_weights(seen.lambda_q, seen.lambda_k, seen.temperature, seen.log_decay, seen.key_bias, seen.sink)
        else:
            p = attention_weights(lambda_q.transpose(1, 2), lambda_k.transpose(1, 2), 1.0)
        for head in range(4):
            assert record["lambda_q"][layer][head][1] == pytest.approx(lambda_q[..., head].quantile(0.5).item(), abs=1e-6)
            entropy = -(p[:, head] * p[:, head].clamp_min(1e-30).log()).sum(-1).mean()
            assert record["entropy"][layer][head] == pytest.approx(entropy.item(), abs=1e-5)
            near = sum(p[b, head, i, max(0, i - 15) : i + 1].sum().item() for b in range(2) for i in range(24)) / 48
            assert record["near_mass"][layer][head] == pytest.approx(near, abs=1e-5)
        assert record["E_k"][layer][1][2] == pytest.approx(E_k[..., 1].quantile(0.95).item(), rel=1e-5)


def test_diagnostics_see_what_the_operator_gets():
    """Also where lambda is changed between the energy and the operator."""
    model, idx = small(), tokens(B=2, T=24)
    for block in model.blocks:
        lambdas = block.attention.lambdas
        block.attention.lambdas = lambda E, lambdas=lambdas: lambdas(E) / 2
    changed = torch.tensor(diagnose(model, idx)["lambda_k"][0])
    for block in model.blocks:
        del block.attention.lambdas
    torch.testing.assert_close(changed, torch.tensor(diagnose(model, idx)["lambda_k"][0]) / 2)


def test_collapse_is_named_once():
    wide, narrow, named = [0.2, 0.5, 0.8], [0.5, 0.501, 0.502], []
    counts = {}
    for at, spread in enumerate([narrow, wide, *[narrow] * 5]):
        named += [(at, line) for line in collapses({"lambda_k": [[wide, spread]]}, counts)]
    assert [at for at, _ in named] == [1 + IN_A_ROW] and "key head 1 of layer 0" in named[0][1]


def test_diagnostics_file_and_bands(here, work):
    records = [json.loads(line) for line in (work / "out" / "small" / "diagnostics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 10, 20] and records[1]["tokens"] == 2560
    assert len(records[0]["lambda_k"]) == 2 and len(records[0]["lambda_k"][0]) == 2 and len(records[0]["lambda_q"][0]) == 4
    assert str(here / "b.png") in ok("plot.py", "out/small", "--bands", f"--out={here}/b.png", cwd=work)
    assert "one output folder" in fails("plot.py", "out/small", "out/small", "--bands", f"--out={here}/c.png", cwd=work)
    (here / "none").mkdir()
    assert "diagnostics.jsonl does not exist" in fails("plot.py", "none", "--bands", cwd=here)
    (here / "none" / "diagnostics.jsonl").write_text('{"tokens": 1, "lambda_k": [1]}\n')
    assert "damaged" in fails("plot.py", "none", "--bands", cwd=here)


def test_energies_are_measured_without_dropout():
    model = small(dropout=0.5)
    expected = energies(model, [tokens()])
    model.train()
    assert torch.equal(energies(model, [tokens()]), expected) and model.training
