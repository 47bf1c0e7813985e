"""The page of view.py: what it holds is what the model computes, and a browser, where there is one, shows it."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, ok, run_script

import view
from common import UserError
from data import tokenizer as tokenizers
from data.embed import token_strings
from data.laplacian import load_laplacian
from model import ModelConfig, Tauformer
from ops import dot
from ops.attention import add_terms, attention_weights
from training import checkpoint
from training.config import Settings

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
TEXT = 'the list of <b>names</b> & "x" </script><!-- \u202e שלום عالم é 😀\n  a list\tof'
ALL = dict(
    **dict(n_head=8, n_kv_head=4, local_heads=2, local_window=5, recall_heads=2, temperature=0.1, learn_temperature=True, forget="gate"),
    **dict(spectral_filter=True, conv=4, key_bias=True, output_gate=True, tau_rope=False),
)
FORMS = {
    "all": ALL,
    "published": dict(n_head=2),
    "slope": dict(n_head=4, forget="slope", tau_mode="learned", local_heads=1),
    "head size": dict(n_embd=128, n_head=4, recall_heads=1),
    "dot": dict(attention="dot", n_head=4, n_kv_head=2, recall_heads=2, forget="gate", key_bias=True),
}


def model_of(work, **form):
    """(model, Laplacian, tokenizer) of random weights with the vocabulary and the graph of work/docs."""
    tokenizer = tokenizers.from_json(json.loads((work / "docs/tokenizer.json").read_text()))
    config = ModelConfig(**dict(vocab_size=tokenizer.vocab_size, block_size=160, n_layer=2, n_embd=32) | form)
    L = None if config.attention == "dot" else torch.from_numpy(load_laplacian(work / "docs/laplacian.parquet"))
    torch.manual_seed(1)
    model = Tauformer(config, L)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model.eval(), L, tokenizer


def save(folder, work, model, L, tokenizer):
    folder.mkdir()
    settings = Settings(data_dir=str(work / "docs"), laplacian=str(work / "docs/laplacian.parquet"))
    state, tensors = checkpoint.RunState(step=3), checkpoint.snapshot(model)
    checkpoint.write(folder / "best.safetensors", tensors, L, model.config, tokenizer.to_json(), state, settings)
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        shutil.copy(work / "out/small" / name, folder)


def data_of(page):
    """What a page holds, its packed arrays as arrays."""
    kinds = {"f4", "u2", "u4"}
    unpack = lambda x: next((np.frombuffer(base64.b64decode(x[k]), k) for k in x if k in kinds and isinstance(x[k], str)), x)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1], object_hook=unpack)


def weights_of(model, tokens, monkeypatch):
    """[(H, T, T)] by layer: of tau heads attention_weights(), of the others the dense softmax of what their operator was given."""
    given = []

    def dense(q, k, log_decay, key_bias, scale, window):
        scale = torch.as_tensor(scale).view(-1, 1, 1) / q.size(-1) ** 0.5
        logits = add_terms(q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT * scale, log_decay, key_bias)
        return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).tril(-window), -torch.inf).softmax(-1)[0]

    def window_attention(q, k, v, log_decay, key_bias, window, scale):
        given.append(dense(q, k, log_decay, key_bias, scale, window))
        return dot.window_attention(q, k, v, log_decay, key_bias, window, scale)

    def dot_attention(q, k, v, scale, log_decay, key_bias):
        given.append(dense(q, k, log_decay, key_bias, scale, len(tokens)))
        return dot.dot_attention(q, k, v, scale, log_decay, key_bias)

    monkeypatch.setattr("model.window_attention", window_attention)
    with torch.no_grad():
        if model.config.attention == "dot":
            for block in model.blocks:
                block.attention.operator = dot_attention
            model(torch.tensor([tokens]))
            return [weights.numpy() for weights in given]
        with model.recording() as seen:
            model(torch.tensor([tokens]))
        tau = [attention_weights(*layer[2:])[0] for layer in seen]
        return [torch.cat([given[n], x]).numpy() if given else x.numpy() for n, x in enumerate(tau)]


def page_weights(data, layer, head, i):
    """The weights (i + 1,) and the sink's share, by the formula of the page."""
    config, seen, T = data["config"], data["text"]["layers"][layer], len(data["text"]["tokens"])
    local = config["n_head"] if config["attention"] == "dot" else config["local_heads"]
    if head < local:
        width = min(seen["width"], T)
        counts = np.minimum(np.arange(T) + 1, width)
        begin = head * counts.sum() + counts[:i].sum()
        stored = seen["rows"][begin : begin + counts[i]].astype(float)
        w = np.r_[np.zeros(i + 1 - counts[i]), np.where(stored == 65535, 0, np.exp(-stored / data["log_steps"]))]
        return w / w.sum(), 0.0
    h, k = head - local, (head - local) * config["n_kv_head"] // config["n_head"]
    of = lambda name, n: np.zeros(T) if seen[name] is None else seen[name].reshape(-1, T)[n].astype(float)
    total = of("log_decay", h).cumsum()
    logits = -abs(of("lambda_q", h)[i] - of("lambda_k", k)) / seen["temperature"][h] + of("key_bias", k) + total[i] - total
    logits = np.r_[logits[: i + 1], -np.inf if seen["sink"] is None else seen["sink"][h]]
    w = np.exp(logits - logits.max())
    return w[:-1] / w.sum(), w[-1] / w.sum()


@pytest.mark.parametrize("form", FORMS)
def test_the_page_holds_what_the_model_computes(work, tmp_path, monkeypatch, form):
    model, L, tokenizer = model_of(work, **FORMS[form])
    save(tmp_path / "run", work, model, L, tokenizer)
    monkeypatch.setattr(view, "TOP", 10**6)  # all edges, so that they sum to the energy
    data, tokens = data_of(view.page(tmp_path / "run/best.safetensors", TEXT, None)), tokenizer.encode(TEXT)
    assert data["text"]["tokens"] == tokens and "".join(data["text"]["pieces"]) == TEXT
    expected = weights_of(model, tokens, monkeypatch)
    for layer, weights in enumerate(expected):
        for head in range(model.config.n_head):
            for i in (0, 1, 7, len(tokens) // 2, len(tokens) - 1):
                w, nothing = page_weights(data, layer, head, i)
                assert abs(w - weights[head, i, : i + 1]).max() < 1e-4, (layer, head, i)
                assert abs(w.sum() + nothing - 1) < 1e-6
    if model.config.attention == "dot":
        assert data["memory"] is None
        return
    for seen in data["text"]["layers"]:
        for side, energies in (("query_parts", "E_q"), ("key_parts", "E_k")):
            for parts, E in zip(seen[side], seen[energies].reshape(-1, len(tokens))):
                np.testing.assert_allclose(parts["terms"].reshape(len(tokens), -1).sum(1), E, rtol=2e-3, atol=1e-4)
    memory = data["memory"]
    assert memory["why"] is None and len(memory["words"]) == len(L) and all(memory["words"])
    assert memory["edges"] == len(memory["weights"]) == int((np.triu(L, 1) < 0).sum())
    i, j = memory["pairs"].reshape(-1, 2).T
    np.testing.assert_allclose(memory["weights"], -L.numpy()[i, j], rtol=1e-6)


DRIVER = """<script>addEventListener("load", () => {
  const report = { weights: [], tabs: [] }, spans = [...document.querySelectorAll(".token")];
  report.text = spans.map(span => span.textContent).join("");
  for (const button of document.querySelectorAll("#heads button")) {
    button.click();
    for (const i of [0, 7, spans.length - 1]) {
      spans[i].click();
      const weights = spans.map(span => span.dataset.weight).filter(weight => weight !== undefined).map(Number);
      const nothing = Number(document.getElementById("tokens").dataset.nothing);
      report.weights.push([i, weights, nothing, document.querySelectorAll("#past rect").length]);
    }
  }
  spans[3].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  report.chosen = document.activeElement.dataset.place;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.click();
    const shown = [...document.querySelectorAll("[role=tabpanel]:not([hidden])")];
    report.tabs.push(shown.map(panel => [panel.id, panel.querySelectorAll("svg").length]));
    if (tab.id === "tab-memory") report.nodes = document.querySelectorAll("#graph circle").length;
  }
  document.body.append(Object.assign(document.createElement("pre"), { id: "report", textContent: JSON.stringify(report) }));
})</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
def test_in_a_browser(work, tmp_path, monkeypatch):
    """A click on a token shows its weights; all tabs draw; nothing of the text is taken for HTML; the console stays empty."""
    model, L, tokenizer = model_of(work, **ALL)
    save(tmp_path / "run", work, model, L, tokenizer)
    page = view.page(tmp_path / "run/best.safetensors", TEXT, None)
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("</body>", DRIVER))
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
    options = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, driven.as_uri()], capture_output=True, text=True, timeout=120)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    report = json.loads(html.unescape(re.search('<pre id="report">(.*?)</pre>', done.stdout, re.S)[1]))
    assert report["text"] == TEXT and report["chosen"] == "4" and report["nodes"] == len(L)
    expected = weights_of(model, tokenizer.encode(TEXT), monkeypatch)
    assert len(report["weights"]) == 2 * 8 * 3
    for n, (i, weights, nothing, bars) in enumerate(report["weights"]):
        layer, head = divmod(n // 3, 8)
        assert abs(sum(weights) + nothing - 1) < 1e-3 and len(weights) == i + 1 and bars == i + 2  # and the shade of what is near
        assert abs(np.array(weights) - expected[layer][head, i, : i + 1]).max() < 1e-4
    assert [[name for name, _ in panels] for panels in report["tabs"]] == [["attention"], ["memory"], ["run"]]
    assert all(pictures for panels in report["tabs"] for _, pictures in panels)


def test_the_command(work, here, monkeypatch):
    """As a user gives it: the page of a run, written again; a user's own file stays; what is wrong is one line."""
    shutil.copytree(work / "out/small", here / "run")
    assert ok("view.py", "run", "--text=the list", cwd=here) == "page: run/view.html\n"
    first = (here / "run/view.html").read_text()
    assert data_of(first)["memory"]["words"] and not re.search(r"https?://(?!www.w3.org/2000/svg)", first)
    with open(here / "run/metrics.jsonl", "a") as file:
        file.write("torn\n")
    done = run_script("view.py", "run", "--text=the list", cwd=here)
    assert done.returncode == 0 and "is damaged" in done.stderr and data_of((here / "run/view.html").read_text())["curves"] is None
    (here / "run/view.html").write_text("mine")
    assert "no checkpoint in nowhere" in fails("view.py", "nowhere", "--text=a", cwd=here)

    def says(*args):
        monkeypatch.setattr(sys, "argv", ["view.py", *args])
        with pytest.raises((UserError, OSError)) as error:
            view.main()
        return str(error.value)

    monkeypatch.chdir(here)
    (here / "empty").write_text("")
    (here / "long").write_text("list " * 100)
    (here / "dir").mkdir()
    for args, expected in (
        (["run", "--text=a"], "--overwrite"),
        (["nowhere", "--text=a"], "no checkpoint in nowhere"),
        (["dir", "--text=a"], "no checkpoint in dir"),
        (["empty", "--text=a"], "damaged"),
        (["run"], "--text_file=FILE"),
        (["run", "--text="], "empty text"),
        (["run", "--text_file=empty", "--out=new.html"], "empty holds no text"),
        (["run", "--text_file=absent", "--out=new.html"], "absent"),
        (["run", "--text_file=long", "--out=new.html"], "context holds 32"),
        (["run", "--text=a", "--text_file=long"], "not both"),
        (["run", "--text=a", "--out=new.htm"], ".html"),
        (["run", "--text=a", "--out=absent/new.html"], "folder absent does not exist"),
        (["run", "--txt=a"], "did you mean --text?"),
        (["run", "--text=a", "--out=new.html", "--data_dir=absent"], "--data_dir=absent is no folder"),
    ):
        assert expected in says(*args), args
    (here / "dir").chmod(0o500)
    may_not = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []  # root may write everywhere
    if not may_not or shutil.which("setpriv"):
        command = [*may_not, sys.executable, ROOT / "view.py", "run", "--text=a", "--out=dir/new.html"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == "view.py: error: cannot write to dir (permission denied): give another --out\n"
    assert (here / "run/view.html").read_text() == "mine" and not list(here.glob("*.htm*")) and not list((here / "dir").iterdir())
    monkeypatch.setattr(sys, "argv", ["view.py", "run", "--text=a", "--overwrite"])
    view.main()
    view.main()  # its own page: without --overwrite too
    assert len(data_of((here / "run/view.html").read_text())["text"]["tokens"]) == 1


def test_where_the_words_are_not(work, tmp_path):
    """The page is made all the same, and says why."""
    model, L, tokenizer = model_of(work, n_head=2)
    words = lambda L, given=None, **settings: view.feature_words(L, settings, tokenizer, given)
    L = L.numpy()
    docs = shutil.copytree(work / "docs", tmp_path / "docs")
    there = dict(data_dir=str(docs), laplacian=str(docs / "laplacian.parquet"))
    found, why = words(L, **there)
    assert why is None and len(found) == len(L)
    assert words(L, str(docs), data_dir="gone", laplacian="gone/l.parquet") == (found, None)
    assert "gone/l.parquet is not there" in words(L, data_dir="gone", laplacian="gone/l.parquet")[1]
    assert "another graph" in words(2 * L, **there)[1]
    assert "could not be read" in words(L)[1]
    (docs / "lsa.npz").write_bytes(b"torn")
    assert "could not be read" in words(L, **there)[1]
    (docs / "lsa.npz").unlink()  # as a sentence model leaves it: the nearest tokens
    nearest, why = words(L, **there)
    assert why is None and nearest != found and set(nearest[0]) <= set(token_strings(tokenizer)) - {""}
    (docs / "tokenizer.json").write_text("{}")
    assert "another vocabulary" in words(L, **there)[1]
    (docs / "embeddings.json").write_text("{}")
    assert "does not hold the embeddings" in words(L, **there)[1]
    for said, expected in (({"graph": "chain"}, "chain"), ({"sha256": "x", "columns": 7}, "random mixtures of the embeddings' 7")):
        Path(docs / "laplacian.json").write_text(json.dumps(said))
        assert expected in words(L, **there)[1]
