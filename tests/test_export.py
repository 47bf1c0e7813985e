"""export.py and the folder that it writes. What needs transformers or lm_eval is skipped where requirements-export.txt is not installed."""

import copy
import functools
import json
import math
import os
import pickle
import random
import sys
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fails, ok, run_script
from test_model import ALL, EXTRAS, FORMS, random_laplacian

import export
from common import UserError
from data.ends import questions
from data.tokenizer import BPE, Characters
from decoding.generate import for_decoding
from model import ModelConfig, Tauformer
from sample import generate_many
from studies import ends
from training import checkpoint
from training.config import Settings

TEXT = "".join((ROOT / name).read_text() for name in ("docs/algorithm.md", "docs/data.md", "model.py"))
DOT_BEST = dict(attention="dot") | functools.reduce(dict.__or__, EXTRAS)
SEVEN = {
    "published": {},
    "best": ALL,
    "dot": dict(attention="dot"),
    "dot-best.1": DOT_BEST,
    "gqa": dict(n_kv_head=2),
    "characters": {},
    "no_softcap": dict(softcap=0.0),
}
MORE = [ALL | dict(n_kv_head=2, forget="slope"), DOT_BEST, dict(tau_mode="learned"), dict(local_heads=2, local_window=1, conv=1)]


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))  # for its copies of the code that it loads
        library = pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-export.txt")
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        yield library


def trained(form, tokenizer, block_size=64):
    """A Tauformer whose weights are far from where they begin, in evaluation mode, and its Laplacian."""
    torch.manual_seed(0)
    config = ModelConfig(**dict(vocab_size=tokenizer.vocab_size, block_size=block_size, n_layer=2, n_head=4, n_embd=32) | form)
    L = random_laplacian(32) if config.attention == "tau" else None
    model = Tauformer(config, L).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_(0.3 * torch.randn_like(x))
        for name, x in model.named_buffers():
            if name.endswith("log_tau"):
                x.add_(1 + 0.3 * torch.randn_like(x))
    return model, L


@pytest.fixture(scope="module")
def loaded(transformers, tmp_path_factory):
    """{form: (model, tokenizer, the model and the tokenizer that the library loads, their folder)}"""
    bpe, characters, found, place = BPE.train([TEXT], 400), Characters.train([TEXT]), {}, tmp_path_factory.mktemp("exported")
    for name, form in SEVEN.items():
        tokenizer = characters if name == "characters" else bpe
        model, L = trained(form, tokenizer)
        path, folder = place / f"{name}.safetensors", place / name
        checkpoint.write(path, checkpoint.snapshot(model), L, model.config, tokenizer.to_json(), checkpoint.RunState(), Settings())
        export.export(path, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        found[name] = model, tokenizer, theirs, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True), folder
    return found


def test_logits_of_fifty_texts(loaded):
    for name, (model, tokenizer, theirs, their_tokenizer, _) in loaded.items():
        for at in range(50):
            text = TEXT[at * 37 : at * 37 + 8 + 5 * at]
            idx = their_tokenizer(text, return_tensors="pt")["input_ids"][:, : model.config.block_size]
            assert idx[0].tolist() == tokenizer.encode(text)[: model.config.block_size]
            with torch.no_grad():
                torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0, msg=lambda m: f"{name}, text {at}: {m}")


def padded(rows, number=0):
    """(input_ids, attention_mask) of lists of tokens, padded on the left."""
    T = max(map(len, rows))
    idx = torch.tensor([[number] * (T - len(row)) + row for row in rows])
    return idx, torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])


def test_the_modelling_file_computes_what_model_py_does(transformers):
    """For every form that the model's own tests have: as a whole, with padding, and token by token. A change of model.py that is not made
    in hub/modeling_tauformer.py, too, fails here."""
    from hub.modeling_tauformer import TauformerConfig, TauformerForCausalLM

    ours, theirs = ModelConfig(), TauformerConfig()
    assert {f.name: getattr(theirs, f.name, None) for f in fields(ours)} == asdict(ours)
    idx = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(1))
    idx[:, 12:] = idx[:, :12]  # something to recall
    lengths = (24, 13, 5)
    ids, mask = padded([idx[row, :n].tolist() for row, n in enumerate(lengths)], number=99)  # no token of the vocabulary
    for form in (*FORMS, *MORE):
        model, _ = trained(dict(vocab_size=50) | form, BPE.train([], 257), block_size=24)
        theirs = TauformerForCausalLM(TauformerConfig(**asdict(model.config))).eval()
        theirs.load_state_dict(export.weights(model))
        with torch.no_grad():
            expected, whole = model(idx), theirs(idx).logits
            torch.testing.assert_close(whole, expected, atol=2e-5, rtol=0, msg=lambda m: f"{form}: {m}")
            assert theirs.generation_config.temperature is None
            steps, cache, at = [], None, 0
            for n in (6, 1, 1, 7, 9):
                out = theirs(ids[:, at : at + n], attention_mask=mask[:, : at + n], cache=cache, use_cache=True)
                steps, cache, at = [*steps, out.logits], out.cache, at + n
            in_pieces, at_once = torch.cat(steps, 1), theirs(ids, attention_mask=mask).logits
        # a temperature of 1e-4 magnifies the rounding of lambda, by which a step and a whole text differ in model.py too
        atol = 2e-3 if form.get("recall_heads") and form.get("attention") != "dot" else 2e-5
        for row, n in enumerate(lengths):
            torch.testing.assert_close(at_once[row, 24 - n :], expected[row, :n], atol=2e-5, rtol=0, msg=lambda m: f"{form}, padded: {m}")
            torch.testing.assert_close(in_pieces[row, 24 - n :], expected[row, :n], atol=atol, rtol=0, msg=lambda m: f"{form}, steps: {m}")


def test_greedy_generation_with_padding(loaded):
    prompts = ["The ", "one running sum", "x"]
    for name, (model, tokenizer, theirs, their_tokenizer, _) in loaded.items():
        n = 200 if name in ("best", "published") else 70  # past the context
        expected = generate_many(for_decoding(copy.deepcopy(model)), tokenizer, prompts, max_new_tokens=n, temperature=0)
        inputs = their_tokenizer(prompts, return_tensors="pt", padding=True)
        tokens = theirs.generate(**inputs, max_new_tokens=n, do_sample=False)[:, inputs["input_ids"].size(1) :]
        assert tokens.shape == (3, n)
        assert [tokenizer.decode_bytes(row).decode("utf-8", "replace") for row in tokens.tolist()] == expected, name
        assert their_tokenizer.batch_decode(tokens) == expected, name


def test_what_the_cache_keeps_and_what_else_generate_can(transformers, loaded):
    model, tokenizer, theirs, their_tokenizer, _ = loaded["best"]
    config, inputs = model.config, their_tokenizer(["The sum", "a"], return_tensors="pt", padding=True)
    cache = transformers.DynamicCache()
    greedy = theirs.generate(**inputs, max_new_tokens=9, do_sample=False, cache=cache)
    layer, far, T = cache.layers[1], config.n_kv_head - config.local_kv_heads, greedy.size(1) - 1
    assert layer.keys.shape == (2, far, T, 1) and layer.values.shape == (2, far, T, 8)  # (V, lambda), no keys
    assert 0 <= layer.keys.min() and layer.keys.max() < 1
    assert all(x.size(2) < T for name, x in layer.more.items() if name.startswith("local"))
    assert torch.equal(theirs.generate(**inputs, max_new_tokens=9, do_sample=False, use_cache=False), greedy)
    beams = [theirs.generate(**inputs, max_new_tokens=9, num_beams=3, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    longer = theirs.generate(
        greedy, attention_mask=(greedy >= 0).long() * F.pad(inputs["attention_mask"], (0, 9), value=1), max_new_tokens=4
    )
    assert torch.equal(longer[:, :-4], greedy)
    with pytest.raises(ValueError, match="takes a DynamicCache"):
        theirs(inputs["input_ids"], cache=transformers.StaticCache(config=theirs.config, max_cache_len=64))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 3\)"):
        theirs(inputs["input_ids"], attention_mask=torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(-1)


def test_loss_gradients_and_saving_again(transformers, loaded, tmp_path, monkeypatch):
    def no_pickle(*args, **more):
        raise AssertionError("a pickle is loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, no_pickle)
    for name in ("best", "dot"):
        model, tokenizer, _, _, folder = loaded[name]
        assert not [path.name for path in folder.iterdir() if path.suffix not in (".json", ".md", ".py", ".safetensors")]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        idx = torch.tensor([tokenizer.encode(TEXT)[:40]])
        labels = idx.clone()
        labels[:, :7] = -100
        out = theirs(idx, labels=labels)
        expected = F.cross_entropy(model(idx)[0, 6:-1], idx[0, 7:])
        torch.testing.assert_close(out.loss, expected)
        out.loss.backward()
        grads = torch.autograd.grad(expected, list(model.parameters()))
        for (weight, x), grad in zip(theirs.named_parameters(), grads):
            torch.testing.assert_close(x.grad, grad, atol=1e-4, rtol=1e-3, msg=lambda m: f"{name}, {weight}: {m}")
        ids, mask = padded([idx[0].tolist(), idx[0, :9].tolist()])
        loss = theirs(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        logits = model(idx)[0]
        both = torch.cat([logits[:-1], logits[:8]]), torch.cat([idx[0, 1:], idx[0, 1:9]])
        torch.testing.assert_close(loss, F.cross_entropy(*both))
        theirs.save_pretrained(tmp_path / name)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert again.config.temperature == model.config.temperature and again.generation_config.temperature is None
        with torch.no_grad():
            assert torch.equal(again(idx).logits, theirs(idx).logits)
        halves = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        with torch.no_grad():
            assert (halves(idx).logits - theirs(idx).logits).abs().mean() < 0.3 and halves.head.weight.dtype is torch.bfloat16


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
PIECES = list("aB'sdmtLVREß 019.,!?-_\n\r\t\x0b\x85\xa0\u2028\u3000\u200b\u0301\ufe0f\u200d\U0001f600\U0001f469東京éſ﷽ﬀ\0")
PIECES += ["  ", "\n\n", "'ll", "'VE", "<|endoftext|>", "<|pad|>", "\r\n", "the ", "1234567", "\U0001f468\u200d\U0001f680", "\u0301"]


def documents(alphabet, n):
    """n texts of pieces of an alphabet, drawn."""
    draw = random.Random(0)
    return ["".join(draw.choice(alphabet) for _ in range(draw.randint(0, 60))) for _ in range(n)]


def test_tokens_of_a_thousand_documents(loaded):
    _, bpe, _, theirs, _ = loaded["published"]
    texts = [*documents(PIECES, 1000), TEXT, "x" + " " * 25_000 + "y\n" + "\t" * 10_001, "<|endoftext|>", "", "a" * 3000]
    numbers = bpe.encode_batch(texts)
    assert theirs(texts)["input_ids"] == numbers
    assert [theirs.decode(row) for row in numbers] == texts
    assert [theirs.decode(row[1:]) for row in numbers] == [bpe.decode_bytes(row[1:]).decode("utf-8", "replace") for row in numbers]
    end = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    assert end == [bpe.end_token] * 3 and theirs.decode(end[:1]) == "<|endoftext|>" and len(theirs) == bpe.vocab_size
    assert theirs("<|endoftext|>", split_special_tokens=False)["input_ids"] == [bpe.end_token]

    _, characters, _, theirs, _ = loaded["characters"]
    texts = [*documents(characters.tokens, 1000), TEXT, "<|endoftext|>"]
    numbers = [characters.encode(text) for text in texts]
    assert theirs(texts)["input_ids"] == numbers and [theirs.decode(row) for row in numbers] == texts
    assert theirs.eos_token_id == characters.end_token
    for refused in (characters.encode, theirs):
        with pytest.raises(Exception, match="京|UNK"):
            refused("a京")


def test_other_vocabularies(transformers):
    """A running text of characters, which has no end token; the patterns of tiktoken's own; what the library cannot express."""
    characters = Characters.train(["ab c\n"], end_token=False)
    files = export.tokenizer_files(characters, 8)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=export.library_tokenizer(characters), **json.loads(files["tokenizer_config.json"])
    )
    rows = theirs(["ab c", "b", "a<|pad|>"[:1]], padding=True)
    assert rows["input_ids"] == [characters.encode("ab c"), [5, 5, 5, characters.id_of["b"]], [5, 5, 5, characters.id_of["a"]]]
    assert theirs.eos_token_id is None and theirs.decode(characters.encode("a b\nc")) == "a b\nc"
    bpe = BPE.train([TEXT], 600)
    for pattern in GPT2, CL100K:
        ours = BPE(pattern, [*bpe.tokens, None], len(bpe.tokens) + 1)  # with a number that is left out, as in cl100k's
        library = export.library_tokenizer(ours)
        texts = [*documents(PIECES, 300), TEXT]
        assert [row.ids for row in library.encode_batch(texts)] == ours.encode_batch(texts)
        assert library.token_to_id("<|endoftext|>") == ours.end_token
    for broken in (
        BPE(bpe.pattern, [*bpe.tokens, "<|endoftext|>"], len(bpe.tokens) + 1),
        BPE(r"\p{script=Greek}+|[\s\S]", bpe.tokens, bpe.end_token),
    ):
        with pytest.raises(UserError, match="the run's tokenizer cannot be written in the format of the library tokenizers"):
            export.tokenizer_files(broken, 8)


def test_the_harness(transformers, work, tmp_path, monkeypatch):
    """lm_eval on an exported run: its loss of a held-out file is that of sample.py --score."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements-export.txt")
    monkeypatch.chdir(tmp_path)
    copied = tmp_path / "corpus"
    copied.mkdir()
    for path in (work / "docs").iterdir():
        (copied / path.name).symlink_to(path)
    said = ok("data/ends.py", "corpus", "--documents=40", "--length=20", cwd=tmp_path)
    ok("export.py", work / "out/small", "--to=exported", cwd=tmp_path)
    found = ends.measured("exported", copied)
    scored = ok("sample.py", work / "out/small", "--score=corpus/held_out.txt", cwd=tmp_path)
    assert found["held_out_bits_per_byte"] == pytest.approx(float(scored.split("bits per byte ")[1].split(",")[0]), abs=1e-3)
    lines = [json.loads(line) for line in (copied / "ends.jsonl").read_text().splitlines()]
    assert found["questions"] == len(lines) > 30 and f"{len(lines)} questions" in said
    assert 0 <= found["accuracy"] <= 1
    Path("prose.txt").write_text("a text of mine")
    monkeypatch.setattr(sys, "argv", ["ends.py", "run", "--tasks=corpus", "--runs=runs.jsonl", "--results=prose.txt"])
    with pytest.raises(UserError, match="--results=prose.txt is no JSON Lines file"):
        ends.main()
    shown = ends.table([{"run": f"out/docs/tau/{seed}", "seed": seed} | found | {"accuracy": seed / 4} for seed in (2, 1)])
    assert f"| tau | 0.375 | 0.250, 0.500 | {len(lines)} |" in shown and "| chance | 0.250 |" in shown


def test_questions():
    texts = [f"Document {n} is about the number {n} and goes on for a while: {n} is even or {n} is odd, {n} times." for n in range(9)]
    for seed in (0, 1):
        found = questions([*texts, "short"], 50, seed)
        assert found == questions([*texts, "short"], 50, seed) and len(found) == 9
        for text, question in zip(texts, found):
            assert text.startswith(question["beginning"]) and len(set(question["ends"])) == 4
            assert text.startswith(question["beginning"] + question["ends"][question["right"]])
            assert max(map(len, question["ends"])) <= 50
    assert len({question["right"] for question in found}) > 1 and questions(texts, 50, 0) != questions(texts, 50, 1)
    for few in ([], texts[:3], texts[:1] * 9):
        with pytest.raises(UserError, match="four held-out documents of 40 characters"):
            questions(few, 50, 0)


def test_the_command_line(transformers, work, tmp_path):
    (tmp_path / "run").symlink_to(work / "out/small")
    (tmp_path / "kept").mkdir()
    lines = ok("export.py", "run", "--to=new/model.v1", cwd=tmp_path).splitlines()
    assert len(lines) == 3 and all("from_pretrained('new/model.v1'" in line for line in lines[1:])
    card = (tmp_path / "new/model.v1/README.md").read_text()
    _, header = checkpoint.read(work / "out/small/best.safetensors")
    for told in ("# model.v1", header["sha256"], "`docs`", f"{header['run']['best_loss']:.4f} nats", "20 steps", "`n_embd` | `32`"):
        assert told in card, told
    names = sorted(path.name for path in (tmp_path / "new/model.v1").iterdir())
    assert len({path.stat().st_mode for path in (tmp_path / "new/model.v1").iterdir()}) == 1  # as the umask says
    ok("export.py", "run", "--to=kept", cwd=tmp_path)  # an empty folder is used
    (tmp_path / "kept/mine.txt").write_text("mine")
    (tmp_path / "kept/config.json").write_text("{}")
    assert "--to=kept is not empty" in fails("export.py", "run", "--to=kept", cwd=tmp_path)
    assert (tmp_path / "kept/config.json").read_text() == "{}"
    ok("export.py", "run", "--to=kept", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "kept/mine.txt").read_text() == "mine" and "tauformer" in (tmp_path / "kept/config.json").read_text()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted([*names, "mine.txt"])
    (tmp_path / "kept/README.md").unlink()
    (tmp_path / "kept/README.md").mkdir()
    before = {path.name: path.is_file() and path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert "kept/README.md is a folder" in fails("export.py", "run", "--to=kept", "--overwrite", cwd=tmp_path)
    assert {path.name: path.is_file() and path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


def test_mistakes(work, tmp_path):
    (tmp_path / "run").symlink_to(work / "out/small")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    whole = (work / "out/small/best.safetensors").read_bytes()
    (tmp_path / "damaged.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tensors, header = checkpoint.read(work / "out/small/best.safetensors")
    for name, key, change in (
        ("kind", "tokenizer", {"kind": "wordpiece"}),
        ("switch", "config", {"no_such_switch": True}),
        ("pattern", "tokenizer", {"pattern": r"\p{script=Greek}+|[\s\S]"}),
        ("state", "run", {"step": "x"}),
    ):
        changed = {**header, key: header[key] | change}
        checkpoint.save(tmp_path / f"{name}.safetensors", tensors, {part: changed[part] for part in ("config", "tokenizer", "run")})
    tensors["model.head.weight"][0, 0] = math.nan
    checkpoint.save(tmp_path / "nan.safetensors", tensors, {part: header[part] for part in ("config", "tokenizer", "run")})
    before = sorted(path.name for path in tmp_path.iterdir())
    late = (  # answered when all is ready to be written, for which the library is needed
        (("pattern.safetensors", "--to=new"), "the run's tokenizer cannot be written in the format of the library tokenizers"),
        (("run", "--to=/proc/new"), "/proc/new"),
        (("run", f"--to={'n' * 300}"), "too long"),
    )
    for args, expected in (
        ((), "--to is missing, as in `python export.py out/quickstart --to=exported/quickstart`"),
        (("run",), "--to is missing"),
        (("run", "--too=new"), "did you mean --to?"),
        (("run", "--to=new", "--overwritten"), "did you mean --overwrite?"),
        (("absent", "--to=new"), "no checkpoint in absent"),
        (("empty", "--to=new"), "no checkpoint in empty"),
        (("file", "--to=new"), "file is damaged, or no checkpoint of train.py"),
        (("damaged.safetensors", "--to=new"), "damaged.safetensors is damaged"),
        (("kind.safetensors", "--to=new"), "broken tokenizer description"),
        (("switch.safetensors", "--to=new"), "no_such_switch"),
        (("state.safetensors", "--to=new"), "state.safetensors is damaged: the step of its run is 'x'"),
        (("run", "--to=file"), "/file is a file: give another folder"),
        (("run", "--to=file/new"), "/file is a file: give another folder"),
        (("run", "--to=full"), "--to=full holds files, and none of them is modeling_tauformer.py"),
        (("run", "--to=full", "--overwrite"), "--to=full holds files, and none of them is modeling_tauformer.py"),
        (("run", "--to=."), "--to=. holds files"),
        (("run", "--to="), "--to: an empty path names nothing"),
        (("run", "--to=\udcff"), "\\udcff' holds a byte that is no UTF-8"),
        (("nan.safetensors", "--to=new"), "nan.safetensors is damaged: its head.weight is not finite"),
        *(late if find_spec("tokenizers") else ()),
    ):
        line = fails("export.py", *args, cwd=tmp_path)
        assert line.startswith("export.py: error: ") and expected in line, (args, line)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, args


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="tokenizers is not installed: pip install -r .*requirements-export.txt"):
        export.tokenizer_files(Characters.train(["abc"]), 8)


def test_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for to in (tmp_path, tmp_path / "new", tmp_path / "a/b"):
        with pytest.raises(UserError, match=rf"--to={to} cannot be written: {tmp_path} may not be written to \(permission denied\)"):
            export.export(tmp_path / "absent", to)
    assert not list(tmp_path.iterdir())


def test_mistakes_of_ends(work, tmp_path):
    (tmp_path / "r.jsonl").write_text("{}\n")
    for script, args, expected in (
        ("data", ("absent",), "no corpus in absent"),
        ("data", (work / "docs", "--documents=3"), "--documents=3 must be at least 4"),
        ("data", (work / "docs", "--length=10"), "--length=10 must be at least 20"),
        ("data", (work / "docs", "--lenght=80"), "did you mean --length?"),
        ("studies", (work / "out/small", "--tasks=x", "--runs=r.jsonl"), "--results is missing"),
        (
            "studies",
            (work / "out/small", "--tasks=x", "--runs=r.jsonl", "--results=x"),
            "no ends.yaml in x: make it by `python data/ends.py",
        ),
        ("studies", ("r.jsonl", "--tasks=x"), "--tasks is for a run to measure"),
        ("studies", ("r.jsonl",), "r.jsonl, line 1 has no 'run'"),
    ):
        line = fails(f"{script}/ends.py", *args, cwd=tmp_path)
        assert expected in line, line
    assert not [path.name for path in (work / "docs").iterdir() if path.suffix in (".yaml", ".txt")]
    assert run_script("data/ends.py", "--help", cwd=tmp_path).returncode == 0
