"""Decoding by CUDA graphs against decoding as it comes. Without a GPU, a tape of torch's operations stands for a graph: like one, it
executes the same operations on the same memory, whatever Python variables have come to be. And on the device "meta", which holds no
numbers, nothing may be asked of a tensor, or be made on another device."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_cache import FORMS, model_and_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decoding.cache
import model as model_module
from decoding import graphs
from decoding.cache import StreamCache
from decoding.generate import decode_one_token, prefill
from decoding.graphs import GraphDecoder
from decoding.stream import RECENT
from ops import recurrence

aten = torch.ops.aten
FORBIDDEN = {aten._local_scalar_dense.default, aten.lift_fresh.default}  # a GPU would have to wait for its CPU


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.fresh = [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in FORBIDDEN, function
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def execute(self):
        if self.fresh:  # recording has executed it
            self.fresh = False
            return
        for function, args, kwargs, before in self.calls:
            result = function(*args, **kwargs)
            pairs = zip(before, result) if isinstance(result, (tuple, list)) else [(before, result)]
            for place, x in pairs:
                if torch.is_tensor(x) and x.data_ptr() != place.data_ptr():
                    place.copy_(x)


class OnlyMeta(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            device = x if isinstance(x, torch.device) else x.device if torch.is_tensor(x) else None
            assert device is None or device.type == "meta", (function, device)
        return result


def recorded(step, *_):
    with Tape() as tape:
        result = step()
    return tape.execute, result


RECALL = dict(temperature=0.1, learn_temperature=True, forget="gate", n_kv_head=4, tau_rope=False)
RECALL |= dict(local_heads=1, local_window=20, recall_heads=2)
EACH_FORM = pytest.mark.parametrize("form", [*FORMS, RECALL, RECALL | dict(conv=4, key_bias=True, spectral_filter=True)], ids=str)


@EACH_FORM
@pytest.mark.parametrize("first", [1, 70])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_graph_does_what_a_token_does(form, first, device, monkeypatch, tmp_path):
    """After a short prompt and a long one, beyond block_size, with so little room that rows are joined at every RECENT-th token."""
    monkeypatch.setattr(decoding.cache, "not_compiled", lambda: "as on a GPU")
    monkeypatch.setattr(StreamCache, "STATE_BYTES", 40_000)
    if device == "cpu":
        monkeypatch.setattr(graphs, "recorded", recorded)
        monkeypatch.setattr(recurrence, "on_cpu", lambda: recurrence.Doubling)  # compiled code is not seen by the tape
        monkeypatch.setattr(torch, "aminmax", lambda x: (np.float32(0), np.float32(1)))  # a check of every token, on a CPU only
    model, idx = model_and_tokens(150, **form)
    model, idx = model.to(device), idx[:1].to(device)
    at_once, one_by_one = StreamCache(model.config, device), StreamCache(model.config, device)
    decode = GraphDecoder(model, at_once)
    with torch.no_grad():
        for cache in (at_once, one_by_one):
            prefill(model, idx[:, :first], cache)
        for t in range(first, 200):
            token = idx[:, t % 150, None]
            torch.testing.assert_close(decode(token), decode_one_token(model, token, one_by_one), atol=1e-5, rtol=1e-5)
            assert at_once.length == one_by_one.length == t + 1
        assert len(decode.graphs) == RECENT
        at_once.save(tmp_path / "session", "hash")
        again = StreamCache.load(tmp_path / "session", model, "hash")
        torch.testing.assert_close(*(decode_one_token(model, token, cache) for cache in (again, one_by_one)))


@EACH_FORM
def test_a_token_asks_nothing_of_a_gpu_and_copies_nothing_to_it(form, monkeypatch):
    monkeypatch.setattr(model_module, "without_autocast", lambda x: nullcontext())  # meta has none
    monkeypatch.setattr(StreamCache, "rows", lambda *_: 40)  # once, a tensor is asked
    model, idx = model_and_tokens(150, **form)
    model, token = model.to("meta"), idx[:1, :1].to("meta")
    cache, rotary = StreamCache(model.config, "meta"), model.rotary(0, 1)
    decode = GraphDecoder(model, cache)
    with torch.no_grad():
        for _ in range(40):
            decode.step(token, rotary)
        state = {key: id(x) for key, x in (cache.kept | cache.last).items()}
        with OnlyMeta():
            for _ in range(RECENT):
                decode.step(token, rotary)
    assert state == {key: id(x) for key, x in (cache.kept | cache.last).items()}


def test_where_no_graph_is_made_tokens_go_as_they_come(monkeypatch, capsys):
    def refused(step, *_):
        raise RuntimeError("CUDA error: not permitted\nwhen capturing")

    decoding.cache.say_once.cache_clear()
    monkeypatch.setattr(graphs, "recorded", refused)
    model, idx = model_and_tokens(60)
    cache, other = StreamCache(model.config), StreamCache(model.config)
    decode = GraphDecoder(model, cache)
    with torch.no_grad():
        for t in range(RECENT + 2):
            assert torch.equal(decode(idx[:, t, None]), decode_one_token(model, idx[:, t, None], other))
    assert cache.length == RECENT + 2 and not decode.graphs
    assert capsys.readouterr().err.count("no CUDA graph was made: CUDA error: not permitted\n") == 1
