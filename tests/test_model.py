import functools
import math

import pytest
import torch
import torch.nn.functional as F

from build_laplacian import load_laplacian, save_laplacian
from common import UserError
from decoding.cache import Cache
from model import (
    ModelConfig,
    Tauformer,
    bounded,
    energy,
    filtered_energy,
    head_laplacians,
    kron_reduction,
    norm,
    spectral_roots,
)
from ops.attention import add_terms, tau_attention
from ops.dot import dot_attention, window_attention
from ops.fused import ChunkedLoss, SquaredReluMLP


def random_laplacian(F, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(F, F, generator=generator, dtype=torch.float64).triu(1)
    weights *= torch.rand(F, F, generator=generator) < density
    weights += torch.diag(torch.ones(F - 1), 1)  # a path: connected
    weights = weights + weights.T
    return torch.diag(weights.sum(1)) - weights


def small(**changes):
    torch.manual_seed(0)
    config = ModelConfig(**{"block_size": 24, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32} | changes)
    model = Tauformer(config, random_laplacian(config.n_embd) if config.attention == "tau" else None)
    for weight in model.parameters():  # larger than at the start, so that attention and mask matter
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def tokens(B=2, T=24, vocab_size=50, seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def test_identity_laplacian_gives_lambda_one_half():
    x = torch.randn(2, 5, 3, 8)
    lam = bounded(energy(x, torch.eye(8).expand(3, 8, 8)), tau=1.0)
    torch.testing.assert_close(lam, torch.full((2, 5, 3), 0.5))


def test_zero_laplacian_gives_uniform_causal_averaging():
    torch.manual_seed(0)
    config = ModelConfig(block_size=6, vocab_size=20, n_layer=1, n_head=2, n_embd=8)
    model = Tauformer(config, torch.zeros(4, 4))
    x, attention = torch.randn(1, 6, 8), model.blocks[0].attention
    out = attention(x, model.rotary(0, 6), model.laplacian, None)
    means = attention.value(x).cumsum(1) / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(out, attention.out(means))


def test_constant_vector_has_no_energy_and_scale_does_not_matter():
    L = random_laplacian(8).float().expand(1, 8, 8)
    assert energy(torch.full((1, 1, 1, 8), 3.0), L).item() == pytest.approx(0, abs=1e-5)
    x = torch.randn(4, 5, 1, 8)
    torch.testing.assert_close(bounded(energy(10 * x, L), 2.0), bounded(energy(x, L), 2.0))
    lam = bounded(energy(x, L), 2.0)
    assert (lam >= 0).all() and (lam < 1).all()


def test_energy_is_the_rayleigh_quotient():
    L, x = random_laplacian(8), torch.randn(8, dtype=torch.float64)
    expected = (x @ L @ x) / (x @ x + 1e-6)
    torch.testing.assert_close(energy(x.view(1, 1, 1, 8), L.view(1, 8, 8)).item(), expected.item())


EXTRAS = [
    dict(learn_temperature=True),
    dict(forget="slope"),
    dict(forget="gate"),
    dict(conv=4),
    dict(key_bias=True),
    dict(output_gate=True),
    dict(recall_heads=2),
]
OF_TAU = [dict(spectral_filter=True), dict(local_heads=2, local_window=5), dict(tau_rope=False)]
ALL = functools.reduce(dict.__or__, [*EXTRAS, *OF_TAU])
FORMS = [
    dict(attention="tau"),
    dict(attention="dot"),
    *EXTRAS,
    *OF_TAU,
    ALL,
    *(dict(attention="dot") | extra for extra in EXTRAS),
    dict(attention="dot") | functools.reduce(dict.__or__, EXTRAS),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_causal(form):
    model, idx = small(**form), tokens()
    before = model(idx)
    for t in (0, 7, 23):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert all(not torch.isclose(before[:, s], after[:, s]).all() for s in range(t, 24))


@pytest.mark.parametrize("extra", [*EXTRAS, *OF_TAU], ids=str)
def test_every_extra_changes_the_model_and_learns(extra):
    """And those that are nothing at first leave the published form as it is."""
    torch.manual_seed(0)
    config = dict(block_size=300, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    published, L, idx = Tauformer(ModelConfig(**config), random_laplacian(32)), random_laplacian(32), tokens(T=300)
    model = Tauformer(ModelConfig(**config | extra), L)
    model.load_state_dict(
        {name: weight for name, weight in published.state_dict().items() if weight.shape == model.state_dict()[name].shape}, strict=False
    )
    if "conv" in extra or "spectral_filter" in extra or "learn_temperature" in extra:
        torch.testing.assert_close(model(idx), published(idx), atol=1e-5, rtol=1e-5)
    else:
        assert (model(idx) - published(idx)).abs().max() > 1e-5
    model(idx, idx).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("form", [{}, ALL | dict(local_heads=1), dict(attention="dot")], ids=str)
def test_recall_heads_attend_to_what_followed(form):
    """Their queries are their keys, a token later, and are made of the token alone: nothing of them reaches the residual stream."""
    model, idx = small(**form | dict(n_kv_head=4, recall_heads=2)), tokens()
    arguments = []
    for block in model.blocks:
        operator = block.attention.operator
        block.attention.operator = lambda *args, operator=operator, **more: arguments.append(args) or operator(*args, **more)
    model(idx)
    assert len(arguments) == 2
    for queries, keys, *_ in arguments:
        torch.testing.assert_close(keys[:, -2:, 1:], queries[:, -2:, :-1])
        assert keys[:, -2:, 0].eq(0).all() and not torch.allclose(keys[:, 0, 1:], queries[:, 0, :-1])
    x = torch.randn(2, 24, 32, requires_grad=True)
    qk, _ = model.blocks[0].attention.projections(x, model.rotary(0, 24), None, model.recall(torch.randn(2, 24, 32), None)[0])
    of_recall = torch.autograd.grad(qk[..., 2:, :].square().mul(torch.randn(8)).sum(), x, retain_graph=True, allow_unused=True)[0]
    assert of_recall is None or of_recall.eq(0).all()
    assert torch.autograd.grad(qk[..., :2, :].square().mul(torch.randn(8)).sum(), x)[0].abs().max() > 0


def test_the_nearest_lambda_is_that_of_the_longest_common_suffix():
    """In a new model: a token that came before after the same other token is nearer than one that came after another."""
    torch.manual_seed(0)
    config = ModelConfig(block_size=64, vocab_size=50, n_layer=1, n_head=4, n_embd=64, recall_heads=3)
    model, arguments = Tauformer(config, random_laplacian(64)), []
    model.blocks[0].attention.operator = lambda *args, **more: arguments.append(args) or tau_attention(*args, **more)
    model(torch.tensor([[7, 3, 9, 5, 3, 8, 2, 6, 7, 3, 1, 4, 11, 5, 3]]))  # 7 3 twice, 5 3 twice
    queries, keys, _, temperature, *_ = arguments[0]
    distance = (queries[0, 1:, -1:] - keys[0, 1:]).abs() / temperature[1:, None]  # of the last token's query, (3, T)
    after_3 = distance[:, [2, 5, 10]]  # the keys that stand after 7 3, 5 3 and 7 3
    assert after_3.argmin(1).eq(1).all() and after_3.max(1)[0].lt(distance[:, [1, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14]].min(1)[0]).all()


def test_the_spectral_filter_is_a_function_of_the_laplacian():
    L, x = random_laplacian(8)[None], torch.randn(2, 3, 1, 8)
    roots, log_filter = spectral_roots(L), torch.randn(1, 8)
    eigenvalues, U = torch.linalg.eigh(L[0])
    g = U @ torch.diag(eigenvalues * log_filter[0].double().exp()) @ U.T
    torch.testing.assert_close(filtered_energy(x, roots, log_filter), energy(x.double(), g[None]).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(filtered_energy(x, roots, torch.zeros(1, 8)), energy(x, L.float()), atol=1e-5, rtol=1e-4)
    assert filtered_energy(torch.ones(1, 1, 1, 8), roots, log_filter).item() < 1e-9


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("T, window", [(1, 4), (3, 4), (4, 4), (23, 4), (24, 1), (10, 64)])
def test_window_attention_is_dense_attention_with_a_mask(T, window, terms):
    q, k, v, scale = torch.randn(2, 4, T, 8), torch.randn(2, 2, T, 8), torch.randn(2, 2, T, 8), torch.rand(4)
    decay, bias = (-torch.rand(2, 4, T), torch.randn(2, 2, T)) if terms else (None, None)
    age = torch.arange(T)[:, None] - torch.arange(T)
    logits = scale.view(4, 1, 1) * (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) / math.sqrt(8)
    if terms:
        c = decay.cumsum(-1)
        logits = logits + c[..., :, None] - c[..., None, :] + bias.repeat_interleave(2, 1)[:, :, None]
    weights = logits.masked_fill((age < 0) | (age >= window), -math.inf).softmax(-1)
    expected = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(window_attention(q, k, v, decay, bias, window, scale), expected)
    last = min(3, T)  # the last queries, with the keys that they see
    keys = slice(max(0, T - last - window + 1), None)
    some = [x[:, :, keys] if terms else None for x in (decay, bias)]
    torch.testing.assert_close(
        window_attention(q[:, :, -last:], k[:, :, keys], v[:, :, keys], *some, window, scale), expected[:, :, -last:]
    )


def test_dot_twin_forgets_as_tau_does():
    """Where all queries and keys are equal, the logits are those that decay and bias give, for either."""
    q, k, v = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    log_decay, key_bias = -torch.rand(2, 4, 9), torch.randn(2, 2, 9)
    tau = tau_attention(torch.zeros(2, 4, 9), torch.zeros(2, 2, 9), v, 1.0, log_decay, key_bias, impl="naive")
    torch.testing.assert_close(dot_attention(q, k, v, 1.0, log_decay, key_bias), tau)
    torch.testing.assert_close(dot_attention(q[:, :, 7:], k, v, 1.0, log_decay, key_bias), tau[:, :, 7:])


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("terms", ["both", "decay", "bias"])
def test_dot_twins_terms_are_those_of_the_logits(heads, terms):
    """Decay and bias as more numbers of q and k, against the softmax of the logits: values and every gradient."""
    torch.manual_seed(0)
    (H, Hkv), T, D = heads, 300, 8
    inputs = [
        torch.randn(2, H, T, D),
        torch.randn(2, Hkv, T, D),
        torch.randn(2, Hkv, T, D),
        torch.rand(H) + 0.5,
        -torch.rand(2, H, T) if terms != "bias" else None,
        torch.randn(2, Hkv, T) if terms != "decay" else None,
    ]
    inputs = [x if x is None else x.double().requires_grad_() for x in inputs]

    def by_definition(q, k, v, scale, log_decay, key_bias):
        k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
        return add_terms(scale.view(-1, 1, 1) * (q @ k.transpose(-1, -2)) / math.sqrt(D), log_decay, key_bias).softmax(-1) @ v

    results = []
    for function, dtype in ((by_definition, torch.float64), (dot_attention, torch.float32)):
        y = function(*(x if x is None else x.to(dtype) for x in inputs))
        given = [x for x in inputs if x is not None]
        results.append([y.double(), *torch.autograd.grad(y, given, torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=3e-5 * expected.abs().max().item(), rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            dot_attention(*(x if x is None else x.float() for x in inputs)).double(), results[0][0], atol=3e-2, rtol=0
        )


@pytest.mark.parametrize("attention", ["tau", "dot"])
def test_grouped_heads_equal_expanded_ones(attention):
    grouped, expanded = small(attention=attention), small(attention=attention, n_kv_head=4)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("key.weight", "value.weight")):
            weights[name] = weight.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
        if name.endswith("log_tau"):
            weights[name] = weight.repeat_interleave(2)
    expanded.load_state_dict(weights)
    if attention == "tau":
        expanded.laplacian = grouped.laplacian.repeat_interleave(2, 0)
    torch.testing.assert_close(grouped(tokens()), expanded(tokens()))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cache_equals_no_cache(form):
    model, idx = small(**form), tokens()
    cache = Cache(model.config)
    with torch.no_grad():
        pieces = [model(idx[:, start:stop], cache=cache) for start, stop in ((0, 9), (9, 12), *zip(range(12, 24), range(13, 25)))]
        atol = (
            2e-3 if form.get("recall_heads") and form.get("attention") != "dot" else 1e-5
        )  # lambda's rounding, over a temperature of 1e-4
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=atol, rtol=1e-4)


def test_cache_of_tau_is_half_as_large():
    sizes = {}
    for attention in ("tau", "dot"):
        model = small(attention=attention, n_embd=256)  # heads of 64
        model(tokens(), cache=(cache := Cache(model.config)))
        sizes[attention] = sum(x.numel() for x in cache.kept.values())
    assert 1 - sizes["tau"] / sizes["dot"] == pytest.approx(0.492, abs=1e-3)


def test_dot_twin_is_scaled_dot_product():
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    logits = 1.2 * q @ k.transpose(-1, -2) / math.sqrt(8)
    expected = logits.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v
    torch.testing.assert_close(dot_attention(q, k, v), expected)


def test_gradients_made_by_hand():
    """Of norm, energy and MLP: against finite differences."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    L = torch.stack([random_laplacian(6, seed=1), random_laplacian(6, seed=2)])
    torch.autograd.gradcheck(norm, x)
    torch.autograd.gradcheck(lambda x: energy(x, L), x)
    up, down = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((8, 6), (6, 8)))
    torch.autograd.gradcheck(SquaredReluMLP.apply, (x[:, :, 0].detach().requires_grad_(), up, down))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), eps=1e-6))
    torch.testing.assert_close(SquaredReluMLP.apply(x[:, :, 0], up, down), (x[:, :, 0] @ up.T).relu().square() @ down.T)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("N", [1, 700, 5000])
def test_chunked_loss(softcap, N):
    torch.manual_seed(0)
    x, weight = torch.randn(N, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True)
    targets = torch.randint(90, (N,))
    z = x @ weight.T
    expected = F.cross_entropy(softcap * torch.tanh(z / softcap) if softcap else z, targets)
    loss = ChunkedLoss.apply(x, weight, targets, softcap, True)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, (x, weight)), torch.autograd.grad(3 * expected, (x, weight))):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_loss_is_that_of_the_logits():
    model, idx = small(), tokens(T=24)
    targets = tokens(T=24).roll(1, 1)
    torch.testing.assert_close(model(idx, targets), F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()))


def test_published_size_and_first_loss():
    torch.manual_seed(0)
    model = Tauformer(ModelConfig(), random_laplacian(384, density=0.05))
    assert model.parameter_count() == 34_057_728
    idx = tokens(1, 129, 30522)
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(30522), abs=0.3)


def test_kron_reduction_keeps_the_network():
    L, keep = random_laplacian(12, seed=3), slice(4, 8)
    reduced = kron_reduction(L, keep)
    torch.testing.assert_close(reduced, reduced.T)
    torch.testing.assert_close(reduced.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-10, rtol=0)
    assert torch.linalg.eigvalsh(reduced)[0] > -1e-10 and torch.linalg.eigvalsh(reduced)[1] > 1e-6
    whole, part = torch.linalg.pinv(L), torch.linalg.pinv(reduced)
    for i in range(4):
        for j in range(4):  # effective resistances
            a, b = 4 + i, 4 + j
            torch.testing.assert_close(whole[a, a] + whole[b, b] - 2 * whole[a, b], part[i, i] + part[j, j] - 2 * part[i, j])


def test_kron_reduction_by_elimination_and_by_harmonic_extension():
    """One node after the other by Gauss, as in a network of resistors; and x^T L_h x is the least energy of any x on the
    whole graph with these values on the head's features, which the harmonic extension has."""
    L = random_laplacian(20, seed=5)
    eliminated = L.clone()
    for node in [*range(19, 11, -1), *range(3, -1, -1)]:
        others = [i for i in range(len(eliminated)) if i != node]
        row = eliminated[node][others]
        eliminated = eliminated[others][:, others] - torch.outer(row, row) / eliminated[node, node]
    reduced = kron_reduction(L, slice(4, 12))
    torch.testing.assert_close(reduced, eliminated, atol=1e-10, rtol=0)
    outside = [*range(4), *range(12, 20)]
    x = torch.randn(20, dtype=torch.float64)
    x[outside] = torch.linalg.solve(L[outside][:, outside], -L[outside][:, 4:12] @ x[4:12])
    assert (x @ L @ x).item() == pytest.approx((x[4:12] @ reduced @ x[4:12]).item(), abs=1e-10)


def test_heads_share_the_laplacian_of_the_first_query_head():
    L, config = random_laplacian(32), ModelConfig(n_head=4, n_kv_head=2, n_embd=32)
    heads = head_laplacians(L, config)
    assert heads.shape == (2, 8, 8)
    torch.testing.assert_close(heads[1], kron_reduction(L, slice(16, 24)).float())


def test_laplacian_that_fits_nothing():
    with pytest.raises(UserError, match=r"F=9 .*head size, 8.*n_embd, 32.*--dim=32"):
        Tauformer(ModelConfig(n_head=4, n_embd=32), random_laplacian(9))


def test_a_laplacian_of_numpy_is_one_of_torch(tmp_path):
    config, L = ModelConfig(vocab_size=20, n_layer=1, n_head=4, n_embd=32), random_laplacian(32)
    save_laplacian(tmp_path / "L.parquet", L, {})
    for other in (L.numpy(), load_laplacian(tmp_path / "L.parquet"), L.tolist()):
        torch.manual_seed(0)
        of_other = Tauformer(config, other).state_dict()
        torch.manual_seed(0)
        assert all(torch.equal(of_other[name], tensor) for name, tensor in Tauformer(config, L).state_dict().items())


def test_how_many_heads_there_may_be_is_said():
    for wrong, said in (
        (dict(recall_heads=6), "recall_heads=6 must be at most 5, of n_head=6"),
        (dict(local_heads=3, recall_heads=4), "recall_heads=4 must be at most 3, of n_head=6 with local_heads=3"),
        (dict(n_kv_head=3, recall_heads=1), "recall_heads=1 must be at most 4 and a multiple of 2, the heads that share keys"),
        (dict(local_heads=6), "local_heads=6 must be at most 5, of n_head=6"),
    ):
        with pytest.raises(UserError, match=said):
            ModelConfig(**wrong)
    ModelConfig(local_heads=3, recall_heads=3)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(n_head=5),
        dict(n_head=4, n_kv_head=3),
        dict(n_head=128),
        dict(attention="flash"),
        dict(conv=1025),
        dict(recall_heads=6),
        dict(local_heads=3, recall_heads=4),
        dict(n_kv_head=3, recall_heads=1),
    ],
)
def test_config_refusals(wrong):
    with pytest.raises(UserError):
        ModelConfig(**wrong)


@pytest.mark.parametrize("T, form", [(24, {}), (300, ALL)], ids=str)  # dense, and the fast operator
def test_compiled_model_gives_the_same_loss_and_gradients(T, form):
    model, idx = small(block_size=T, **form), tokens(T=T)
    results = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = call(idx, idx)
        loss.backward()
        results.append([loss, *(weight.grad for weight in model.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_training_does_not_depend_on_the_implementation(monkeypatch):
    def losses(impl):
        monkeypatch.setattr("model.tau_attention", functools.partial(tau_attention, impl=impl))
        torch.manual_seed(0)
        model = Tauformer(ModelConfig(block_size=70, vocab_size=50, n_layer=2, n_head=4, n_embd=32, temperature=0.1), random_laplacian(32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for _ in range(30):
            idx = (torch.arange(71) + torch.randint(50, (4, 1))) % 50
            loss = model(idx[:, :-1], idx[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return curve

    naive = losses("naive")
    assert naive[-1] < naive[0] - 0.05
    for impl in ("walk", "tree"):
        assert losses(impl) == pytest.approx(naive, abs=1e-3)
