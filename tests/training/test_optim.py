import math

import pytest
import torch
from test_model import random_laplacian

from model import ModelConfig, Tauformer
from training import optim


def small_model(**form):
    torch.manual_seed(0)
    return Tauformer(ModelConfig(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32, **form), random_laplacian(32))


@pytest.mark.parametrize("attention, recall_heads", [("tau", 0), ("tau", 2), ("dot", 2)])
def test_temperatures_and_gates_of_taus_recall_heads_learn_faster(attention, recall_heads):
    model = small_model(attention=attention, recall_heads=recall_heads, learn_temperature=True)
    optimizer = optim.adamw(model, 1.0, (0.9, 0.99), weight_decay=0.1)
    optim.set_learning_rate(optimizer, 0.5)
    names = {weight: name for name, weight in model.named_parameters()}
    of = {names[weight]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for weight in group["params"]}
    assert set(of) == set(names.values()) and optimizer.param_groups[0]["lr"] == 0.5  # that which is logged
    for weight, name in names.items():
        fast = attention == "tau" and recall_heads and (".hold." in name or name.endswith("log_sharpness"))
        assert of[name] == (5.0 if fast else 0.5, 0.1 if weight.ndim == 2 else 0.0), name


@pytest.mark.parametrize("recall_heads", [0, 2])
def test_gradients_of_recall_heads_have_a_norm_of_their_own(recall_heads):
    model = small_model(recall_heads=recall_heads, tau_rope=False, spectral_filter=True)
    idx = torch.randint(50, (2, 17))
    model(idx[:, :-1], idx[:, 1:]).backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    groups = {name: bool(recall_heads) and name.endswith(optim.SHARP) for name in before}
    norm = lambda grads, sharp: torch.stack([grads[name].norm() for name in grads if groups[name] is sharp] or [torch.zeros(())]).norm()
    norms = {sharp: norm(before, sharp) for sharp in (False, True)}
    assert bool(norms[True] > 0) is bool(recall_heads)
    limit = norms[False].item() / 2
    found = optim.clip_gradients(model, 0)
    assert found == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
    assert all(torch.equal(weight.grad, before[name]) for name, weight in model.named_parameters())
    assert optim.clip_gradients(model, limit) == pytest.approx(found, rel=1e-5)
    for name, weight in model.named_parameters():
        scale = min(1, limit / norms[groups[name]].item())
        torch.testing.assert_close(weight.grad, before[name] * scale, rtol=1e-4, atol=1e-9)
