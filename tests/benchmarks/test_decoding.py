"""bench.py decode with a small model; with --device=cuda too, on the CPU with the caches of a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

import decoding.cache
from benchmarks import decoding as bench
from benchmarks import report
from model import ModelConfig, Tauformer


@pytest.fixture
def small(tmp_path, monkeypatch):
    sizes = dict(block_size=64, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    model = lambda attention, **form: Tauformer(ModelConfig(attention=attention, **sizes, **form), torch.eye(16)).eval()
    monkeypatch.setattr(bench, "published_model", model)
    monkeypatch.setattr(
        bench.training, "model_of", lambda file, instead, T: model(file[:3], **dict(recall_heads=1, forget="gate") | instead)
    )
    monkeypatch.setattr(report, "place", lambda name: tmp_path / name)
    monkeypatch.setattr(bench, "place", lambda name: tmp_path / name)


def test_decoding(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BEST_CONTEXT", 300)
    monkeypatch.setattr(bench, "LONG_CONTEXTS", (300, 600))
    monkeypatch.setattr(bench, "in_own_process", lambda function, contexts: function(contexts))
    bench.bench_decode(SimpleNamespace(device="cpu", repeats=1, longest=600))
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    kinds = ("dot, (K, V)", "tau, dense", "tau, exact", "tau, stream")
    assert [(row["kind"], row["context"]) for row in rows if row["table"] == "long context"] == [(k, n) for n in (300, 600) for k in kinds]
    names = "dot best, (K, V)", "tau best, exact", "tau best, stream"
    names += tuple(f"tau best without recall heads, {cache}" for cache in ("exact", "stream"))
    assert tuple((row["kind"], row["context"]) for row in rows if row["table"] == "best forms") == tuple((name, 300) for name in names)
    assert all(0 < row["p50_ms"] <= row["p95_ms"] and row["cache_mb"] > 0 for row in rows) and (tmp_path / "decode.png").exists()


def test_decoding_of_batches(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoding.cache, "not_compiled", lambda: "as on a GPU")
    monkeypatch.setattr(bench, "BATCHES", (1, 3))
    monkeypatch.setattr(bench, "BATCH_CONTEXTS", (300, 1024, 2048))
    for n in (0, 1, 300):
        model = bench.published_model("tau")
        assert bench.filled(model, decoding.cache.StreamCache(model.config), n).length == n
    make = bench.make_cache

    def made(name, config, device, length):
        if length > 1000 and config.attention == "dot":
            raise torch.OutOfMemoryError("no memory left\nat all")
        return make(name, config, device, length)

    monkeypatch.setattr(bench, "make_cache", made)
    bench.bench_decode_batches(SimpleNamespace(device="cpu", repeats=1, longest=1024))
    rows = json.loads((tmp_path / "decode_cuda.json").read_text())["rows"]
    assert [(row["batch"], row["context"], row["kind"]) for row in rows] == [
        (batch, n, kind)
        for batch in (1, 3)
        for n in (300, 1024)
        for kind in ("dot, (K, V)", "tau, exact", "tau, stream")
        if n == 300 or "dot" not in kind
    ]
    size = {(row["batch"], row["context"], row["kind"]): row["cache_mb"] for row in rows}
    for kind, of_one in (("dot, (K, V)", 2 * 4 * 32 * 364 / 1e6), ("tau, exact", 4 * (32 + 2) * 364 / 1e6)):
        assert size[1, 300, kind] == pytest.approx(of_one) and size[3, 300, kind] == pytest.approx(3 * of_one)
    assert size[1, 300, "tau, stream"] == size[1, 1024, "tau, stream"]
    assert "dot, (K, V), batch 3, after 1,024 tokens: no memory left" in capsys.readouterr().err
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["tokens_per_s"] * row["p50_ms"] == pytest.approx(1e3 * row["batch"])
        assert row["times_as_fast_as_dot"] == "-" if row["context"] == 1024 else row["times_as_fast_as_dot"] > 0
