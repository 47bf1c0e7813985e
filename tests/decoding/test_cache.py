"""The caches of decoding against the forward pass without one."""

import math

import pytest
import torch
from test_model import ALL, random_laplacian

from common import UserError
from data import checkpoint_file
from decoding.cache import BLOCK, SEGMENT, Cache, ExactCache, StreamCache, decode, grown, segments
from decoding.generate import decode_n_tokens
from decoding.stream import NOWHERE, RECENT, stream
from model import ModelConfig, Tauformer, energy
from ops.attention import tau_attention

FORMS = [dict(), dict(temperature=0.01), dict(temperature=0.05) | ALL, dict(temperature=0.1, forget="slope", key_bias=True)]


def model_and_tokens(T, **form):
    torch.manual_seed(0)
    sizes = dict(block_size=T, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    model = Tauformer(ModelConfig(**sizes | form), random_laplacian(32))
    for name, weight in model.named_parameters():
        weight.data *= 1 if name.endswith("sharpness") else 3
    return model, torch.randint(50, (2, T))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("first", [1, 2 * SEGMENT, 333])
def test_exact_is_the_forward_pass_at_every_position(form, first):
    """Prefilled at once, then three tokens together, then one by one, over four segments' ends."""
    T = 4 * SEGMENT + 5
    model, idx = model_and_tokens(T, **form)
    cache = ExactCache(model.config)
    with torch.no_grad():
        ends = [0, first, first + 3, *range(first + 4, T + 1)]
        pieces = [model(idx[:, start:stop], cache=cache) for start, stop in zip(ends, ends[1:])]
        atol = 5e-4 if form.get("recall_heads") else 1e-4  # their temperature is 1e-4, which magnifies what lambda is rounded to
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=atol, rtol=0)


BEYOND = [
    *FORMS,
    dict(n_kv_head=4),
    dict(n_kv_head=1, conv=3),
    dict(attention="dot"),
    dict(attention="dot", forget="gate", key_bias=True, conv=4, output_gate=True, recall_heads=2),
    dict(temperature=0.05, n_kv_head=4, tau_rope=False, local_heads=2, local_window=5, recall_heads=1, forget="gate"),
]


@pytest.mark.parametrize("form", BEYOND, ids=str)
def test_decoding_goes_on_beyond_the_context(form):
    """Greedily, to three times block_size, from prompts of unequal length: each token is the likeliest in a forward pass of a model with
    the same weights whose context holds all of them. The exact cache grows twice on the way; none and plain do as it does."""
    T, prompts = 100, [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    model, _ = model_and_tokens(T, **form)
    longer, _ = model_and_tokens(3 * T, **form)
    longer.load_state_dict(model.state_dict())
    for cache, n in (("exact", 3 * T - 7), ("plain", 3 * T - 7), ("none", T)):
        rows = [list(prompt) for prompt in prompts]
        for row, token in decode_n_tokens(model, prompts, [0, 1], n, 0.0, 0, 1.0, cache):
            rows[row].append(token)
        for row, prompt in zip(rows, prompts):
            with torch.no_grad():
                logits = longer(torch.tensor([row[:-1]]))[0, len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(row[len(prompt) :])[:, None])
            assert len(row) == len(prompt) + n and (logits.amax(1, keepdim=True) - chosen).max() < 1e-3


def test_a_cache_grows_in_pieces_of_any_size():
    """Two rows of room at first, then pieces that are far larger than what there is."""
    model, idx = model_and_tokens(4 * SEGMENT, temperature=0.05, forget="gate")
    with torch.no_grad():
        expected = model(idx)
        for cache in (Cache(model.config, 2), ExactCache(model.config, 2)):
            ends = [0, 1, 2, 3, 200, 201, 4 * SEGMENT]
            pieces = [model(idx[:, start:stop], cache=cache) for start, stop in zip(ends, ends[1:])]
            torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no memory for a cache of .* tokens"):
        grown(torch.zeros(1, 4, 2, 64), 2**50)


def test_exact_cache_is_smaller_than_keys_and_values():
    model = Tauformer(ModelConfig(block_size=1024, vocab_size=50, n_layer=1, n_head=6, n_embd=384), random_laplacian(384))
    with torch.no_grad():
        model(torch.randint(50, (1, 1000)), cache=(cache := ExactCache(model.config)))
    assert cache.nbytes() < 0.6 * 2 * 4 * 384 * 1024


def test_segments():
    assert segments(0) == [] and segments(SEGMENT) == [(0, SEGMENT)]
    assert segments(13 * SEGMENT) == [(start * SEGMENT, stop * SEGMENT) for start, stop in ((0, 8), (8, 12), (12, 13))]
    assert SEGMENT % BLOCK == 0


def stream_config(**more):
    return ModelConfig(block_size=64, vocab_size=50, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, **more)


def streamed(step, lambda_q, lambda_k, v, temperature, log_decay=None, key_bias=None, size=8e6):
    """(out of a stream, in pieces; out, exactly, in float64)"""
    cache = StreamCache(stream_config())
    cache.STATE_BYTES = size
    if step == "plain torch":
        cache.step = stream
    attend, parts, T = cache.attend(0, tau_attention), [], v.size(2)
    for start, stop in ((0, 200), (200, 201), (201, T)):
        part = lambda x: x if x is None else x[:, :, start:stop]
        parts.append(attend(part(lambda_q), part(lambda_k), part(v), temperature, part(log_decay), part(key_bias)))
        cache.length = stop
    double = [x if x is None else x.double() for x in (lambda_q, lambda_k, v, temperature, log_decay, key_bias)]
    return torch.cat(parts, 2), tau_attention(*double, impl="naive")


STEPS = pytest.mark.parametrize("step", ["compiled", "plain torch"])


@STEPS
@pytest.mark.parametrize("temperature", [1.0, 0.03, 0.001])
@pytest.mark.parametrize("terms", [False, True])
def test_streams_error_is_within_its_bound(temperature, terms, step):
    """No weight is off by more than a factor exp(h), h = 1 / CELLS: |out - exact| <= exp(h) (exp(h) - 1) sum_j p_j |v_j - exact|."""
    torch.manual_seed(0)
    T, D, h = 300, 8, 1 / StreamCache.CELLS
    lambda_q, lambda_k, v = torch.rand(1, 2, T), torch.rand(1, 1, T), torch.randn(1, 1, T, D)
    temperatures = torch.tensor([temperature, temperature * 1.5])
    more = (-0.1 * torch.rand(1, 2, T), torch.randn(1, 1, T)) if terms else ()
    out, exact = streamed(step, lambda_q, lambda_k, v, temperatures, *more)
    error = (out - exact).norm(dim=-1)
    p = tau_attention(lambda_q, lambda_k, torch.eye(T).expand(1, 1, T, T), temperatures, *more, impl="naive")
    far = (p * (v[:, :, None] - exact.float()[:, :, :, None]).norm(dim=-1)).sum(-1)
    assert (error <= math.exp(h) * (math.exp(h) - 1) * far + 2e-5).all()
    assert error.max() > 2e-6 and error.square().mean().sqrt() < 0.01


@STEPS
def test_a_small_stream_keeps_what_counts(step):
    """With 60 rows a head and a temperature for which every key has a cell of its own: keys of 40 kinds are kept whole; of many kinds
    those that decay has left; and where nothing decays, the nearest are joined, which costs the less the fewer share a row."""
    torch.manual_seed(0)
    T, D, rows = 300, 8, 60
    size = lambda rows: (rows + RECENT) * 2 * 4 * (D + 2)
    kinds, v = torch.rand(40)[torch.randint(0, 40, (3 * T,))], torch.randn(1, 1, T, D)
    out, exact = streamed(step, kinds[: 2 * T].view(1, 2, T), kinds[2 * T :].view(1, 1, T), v, torch.tensor([1e-5, 2e-5]), size=size(rows))
    torch.testing.assert_close(out, exact.float(), atol=1e-5, rtol=0)
    keys = torch.rand(1, 1, T)
    queries = torch.stack([keys[0, 0, torch.arange(T) - torch.randint(0, 20, (T,)).minimum(torch.arange(T))]] * 2)[None]
    decay = torch.full((1, 2, T), -0.4)
    out, exact = streamed(step, queries, keys, v, torch.tensor([1e-3, 1e-2]), decay, size=size(rows))
    assert (out - exact).abs().max() < 5e-3
    errors = []
    for rows in (60, 120, 240):
        out, exact = streamed(step, torch.rand(1, 2, T), keys, v, torch.tensor([0.005, 0.02]), size=size(rows))
        errors.append((out - exact).square().mean().sqrt().item())
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]


def test_streams_state_does_not_grow_and_keeps_its_cap(monkeypatch):
    model = Tauformer(ModelConfig(block_size=64, vocab_size=50, n_layer=2, n_head=4, n_embd=32, temperature=0.002), random_laplacian(32))
    monkeypatch.setattr(StreamCache, "STATE_BYTES", 200_000)
    with torch.no_grad():
        model(torch.randint(50, (1, 64)), cache=(cache := StreamCache(model.config)))
        before = cache.nbytes()
        for _ in range(3):
            model(torch.randint(50, (1, 200)), cache=cache)
    assert cache.length == 664 and cache.nbytes() == before and 190_000 < before < 201_000


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_stream_is_the_same_in_plain_torch(form, tmp_path):
    """And a session that was begun with one goes on with the other; so are single steps with biases of 50 and 90, and with a sink."""
    model, idx = model_and_tokens(400, **form)
    compiled, plain = StreamCache(model.config), StreamCache(model.config)
    plain.step, plain.energy = stream, energy
    with torch.no_grad():
        for start, stop in ((0, 1), (1, 200), *((t, t + 1) for t in range(200, 300))):
            logits = [model(idx[:, start:stop], cache=cache) for cache in (compiled, plain)]
            torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
            if stop == 250:
                compiled.save(tmp_path / "session", "hash")
                plain.save(tmp_path / "other", "hash")
                compiled = StreamCache.load(tmp_path / "other", model, "hash")
                plain = StreamCache.load(tmp_path / "session", model, "hash")
                plain.step, plain.energy = stream, energy
    rows = 6 + RECENT
    full = lambda *shape, x, dtype=torch.float32: torch.full((1, 2, *shape), x, dtype=dtype)
    state = full(rows, x=NOWHERE), full(rows, x=-math.inf), full(rows, 8, x=0.0), full(x=0.0, dtype=torch.float64)
    other = tuple(x.clone() for x in state)
    for step, bias in enumerate(4 * (0.0, 50.0, -3.0, 90.0)):
        tokens = torch.rand(1, 2, 3), torch.rand(1, 1, 3), torch.randn(1, 1, 3, 8), -torch.rand(1, 2, 3).double()
        tokens += torch.tensor([[[0, bias, 1]]]).double(), torch.tensor([0.3, 0.1]).double(), torch.tensor([4.0, 10.0]).double()
        sink = torch.tensor([-1.0, 30.0]).double() if bias else None
        outs = decode().stream(*tokens, *state, sink, 3 * step), stream(*tokens, *other, sink, 3 * step)
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_rows_are_as_many_as_cells_or_as_there_is_room_for():
    cache = StreamCache(stream_config())
    cache.STATE_BYTES = 4 * 10 * 2 * (100 + RECENT)  # 100 rows a head
    for cells, rows in (([32, 16], 32), ([32, 1e9], 100), ([100, 101], 100), ([1, 1], 1)):
        assert cache.rows(torch.tensor(cells, dtype=torch.float64), 8) == rows
    cache.STATE_BYTES = 1
    assert cache.rows(torch.tensor([32.0, 32.0], dtype=torch.float64), 8) == 1


def test_a_stream_of_another_model_is_refused(tmp_path):
    model, idx = model_and_tokens(20)
    cache = StreamCache(model.config)
    with torch.no_grad():
        model(idx, cache=cache)
    cache.save(tmp_path / "s", "hash")
    again = StreamCache.load(tmp_path / "s", model, "hash")
    assert again.length == 20 and all(torch.equal(again.kept[key], x) for key, x in cache.kept.items())
    tensors, header = checkpoint_file.load(tmp_path / "s", ["session"], "session")
    wrong_sessions = [{"length": length} for length in (10**30, -1, "x", 2**53 - 1, 20.0)]
    wrong_sessions += [{"pending": pending} for pending in (3, [10**9], "12", [1, 2], [1.0])]
    for session in (*wrong_sessions, {"unshown": "zz"}, {"unshown": "00" * 9}, {"unshown": 1}):
        checkpoint_file.save(tmp_path / "wrong", tensors, {"session": header["session"] | session})
        with pytest.raises(UserError, match="damaged"):
            StreamCache.load(tmp_path / "wrong", model, "hash")
    state = tensors["kept.0.value"]
    for wrong in (
        state[:0],
        torch.zeros(10**12, 0),
        state[0, 0, 0, 0],
        state[:, :-1],
        state.double(),
        state * math.nan,
        state.repeat(2, 1, 1, 1),
    ):
        checkpoint_file.save(tmp_path / "wrong", tensors | {"kept.0.value": wrong.clone()}, {"session": header["session"]})
        with pytest.raises(UserError, match="damaged"):
            StreamCache.load(tmp_path / "wrong", model, "hash")
    with pytest.raises(UserError, match="the session of another checkpoint"):
        StreamCache.load(tmp_path / "s", model, "of other weights")
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        StreamCache.load(tmp_path / "s", model, "hash")


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: -x, lambda x: x * float("nan")])
def test_lambdas_that_a_stream_cannot_take_are_refused(change):
    """Where the model has been changed so that they leave the range that its bins cover; exact has no such range."""
    model, idx = model_and_tokens(300)
    for block in model.blocks:
        lambdas = block.attention.lambdas
        block.attention.lambdas = lambda E, lambdas=lambdas: change(lambdas(E))
    with torch.no_grad(), pytest.raises(UserError, match="needs lambdas from 0 to 1; layer 0"):
        model(idx[:1], cache=StreamCache(model.config))
