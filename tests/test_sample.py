import copy
import gzip
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, fails, ok, run_script

from common import UserError
from data import tokenizer as tokenizers
from data.corpus import Corpus
from decoding.cache import StreamCache
from decoding.generate import decode_n_tokens, for_decoding, probabilities, sample
from decoding.score import loss_of
from sample import Text, generate_many, load
from training import checkpoint


@pytest.fixture(scope="module")
def trained(work):
    path = work / "out" / "small" / "best.safetensors"
    tensors, header = checkpoint.read(path)
    return checkpoint.build_model(tensors, header, path).eval(), tokenizers.from_json(header["tokenizer"])


def generate(model, prompts, n, temperature=0.0, top_k=0, top_p=1.0, seed=0, cache="exact"):
    """(B, n) new tokens of prompts, the rows drawn with seed, seed + 1, ..."""
    rows = [[] for _ in prompts]
    for row, token in decode_n_tokens(model, prompts, [seed + row for row in range(len(prompts))], n, temperature, top_k, top_p, cache):
        rows[row].append(token)
    assert {len(row) for row in rows} == {n}
    return torch.tensor(rows)


def test_probabilities_by_hand():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    logits = p.log() + 5
    close = torch.testing.assert_close
    close(probabilities(logits, 1.0, 0, 1.0), p)
    close(probabilities(logits, 0.5, 0, 1.0), p**2 / (p**2).sum())
    close(probabilities(logits, 1.0, 2, 1.0), torch.tensor([[0, 4 / 7, 0, 3 / 7]], dtype=torch.float64))
    close(probabilities(logits, 1.0, 9, 0.65), torch.tensor([[0, 4 / 7, 0, 3 / 7]], dtype=torch.float64))
    close(probabilities(logits, 1.0, 0, 0.75), torch.tensor([[0, 4 / 9, 2 / 9, 3 / 9]], dtype=torch.float64))
    close(probabilities(logits, 0, 3, 0.9), torch.tensor([[0, 1.0, 0, 0]], dtype=torch.float64))
    close(probabilities(logits, 1.0, 0, 1e-9), torch.tensor([[0, 1.0, 0, 0]], dtype=torch.float64))


def test_draws_follow_the_probabilities():
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(0)]
    counts = torch.bincount(torch.cat([sample(p, generators)[0] for _ in range(20_000)]), minlength=4)
    assert counts[1] == 0
    expected = 20_000 * p[0, [0, 2, 3]]
    assert ((counts[[0, 2, 3]] - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_the_layout_for_decoding_changes_no_number(trained):
    model, _ = trained
    other, idx = for_decoding(copy.deepcopy(model)), torch.randint(model.config.vocab_size, (2, 9))
    assert other.head.weight.stride() == (1, model.config.vocab_size) and torch.equal(other.head.weight, model.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(other(idx), model(idx))


def test_cached_generation_equals_uncached(trained):
    """Past the context too (tests/decoding/test_cache.py); of a longer prompt the last block_size tokens are read."""
    model, _ = trained
    prompts, T = [[5, 6, 7], [9, 9, 9]], model.config.block_size
    tokens = generate(model, prompts, 2 * T)
    context = torch.tensor(prompts)
    for produced in tokens.T[: T - 2]:
        with torch.no_grad():
            assert (model(context)[:, -1].argmax(-1) == produced).all()
        context = torch.cat([context, produced[:, None]], 1)
    assert torch.equal(generate(model, prompts, 2 * T, cache="none"), tokens)
    long = (7 * torch.arange(2 * T) % 50).tolist()
    assert torch.equal(generate(model, [long], 9), generate(model, [long[-T:]], 9))


@pytest.mark.parametrize("cache", ["exact", "stream"])
def test_a_sample_does_not_depend_on_its_batch(trained, cache):
    """Nor on other prompts, shorter or longer."""
    model, _ = trained
    options = dict(temperature=1.0, top_k=50, top_p=0.9, seed=7, cache=cache)
    alone = generate(model, [[5, 6]], 40, **options)
    many = generate(model, [[5, 6], [5, 6], [5, 6, 7, 8, 9, 10, 11], [3]], 40, **options)
    assert torch.equal(many[:1], alone) and not torch.equal(many[1], many[0])
    assert torch.equal(many[2:3], generate(model, [[5, 6, 7, 8, 9, 10, 11]], 40, **options | dict(seed=9)))


def test_text_and_nothing_else(work, trained, tmp_path):
    model, tokenizer = trained
    rows = generate(model, [tokenizer.encode("def ")] * 2, 30, 0.8, 200, 1.0, 3).tolist()
    expected = "\n".join(tokenizer.decode_bytes(row).decode("utf-8", "replace") for row in rows)
    (tmp_path / "prompt.txt").write_text("def ")
    (tmp_path / "prompts.txt").write_text("def \nThe list of\n")
    shutil.copytree(work / "out" / "small", tmp_path / "moved")
    command = ["sample.py", "moved", "--max_new_tokens=30", "--num_samples=2", "--seed=3"]
    assert ok(*command, "--prompt=def ", cwd=tmp_path) == expected
    assert ok(*command, "--prompt_file=prompt.txt", cwd=tmp_path) == expected
    assert ok(*command, "--prompt_file=-", stdin="def ", cwd=tmp_path) == expected
    assert ok(*command, "--prompts=prompts.txt", cwd=tmp_path).startswith(expected + "\n")


def test_pieces_are_whole_characters_and_end_at_a_stop(trained):
    _, tokenizer = trained
    text = "naïve 東京 </s> and more"
    tokens = tokenizer.encode(text)
    for stops, expected in (((), text), (("</s>",), "naïve 東京 "), (("zzz", "京"), "naïve 東"), (("more!",), text)):
        pieces = Text(tokenizer, stops)
        shown = [pieces.add(token) for token in tokens]
        assert pieces.stopped == (expected != text)
        shown.append(pieces.end())
        assert "".join(shown) == expected
        assert all("\ufffd" not in piece for piece in shown)


def test_stop_ends_a_sample(work):
    whole = ok("sample.py", "out/small", "--max_new_tokens=60", "--temperature=0", cwd=work)
    stop = whole[20:23]
    assert ok("sample.py", "out/small", "--max_new_tokens=60", "--temperature=0", f"--stop={stop}", cwd=work) == whole[: whole.index(stop)]


def test_interactive(work):
    done = run_script("sample.py", "out/small", "--max_new_tokens=8", "--interactive", stdin="def\nclass\n", cwd=work)
    expected = [ok("sample.py", "out/small", "--max_new_tokens=8", f"--prompt={prompt}", cwd=work) for prompt in ("def", "class")]
    assert done.stdout == "".join(text + "\n" for text in expected) and done.stderr.count("[8 tokens, ") == 2
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "out/small", "--max_new_tokens=8", "--interactive"],
        input=b"\xff\n",
        cwd=work,
        capture_output=True,
    )
    assert done.returncode == 0 and b"[8 tokens, " in done.stderr


def test_a_session_goes_on(work, tmp_path):
    """Two halves of a prompt, and two of a sample, are one; the second has no prompt of its own."""
    command = ["sample.py", "out/small", "--temperature=0", "--cache=stream"]
    whole = ok(*command, "--prompt=The list of objects", "--max_new_tokens=50", cwd=work)
    session = f"--session={tmp_path}/s.safetensors"
    assert ok(*command, session, "--prompt=The list of", "--max_new_tokens=0", cwd=work) == ""
    assert ok(*command, session, "--prompt= objects", "--max_new_tokens=0", cwd=work) == ""
    first = ok(*command, session, "--max_new_tokens=20", cwd=work)
    assert first + ok(*command, session, "--max_new_tokens=30", cwd=work) == whole
    (tmp_path / "s.safetensors").write_bytes(b"x" * 100)
    assert "damaged, or no session" in fails(*command, session, cwd=work)


def test_a_session_is_cut_inside_a_character(trained, monkeypatch, tmp_path):
    """The first bytes of a character wait in the session for the others."""
    model, _ = trained

    class Bytes:
        end_token, encode, decode_bytes = None, staticmethod(lambda text: list(text.encode())), staticmethod(bytes)

    left, cache, texts = list("naïve 漢".encode()), StreamCache(model.config), []
    monkeypatch.setattr("decoding.generate.decode_n_tokens", lambda model, prompts, seeds, n, *_: ((0, left.pop(0)) for _ in range(n)))
    cache.pending = [1]
    for n in (3, 5, 2):
        texts += generate_many(model, Bytes, [""], max_new_tokens=n, cache=cache)
        cache.save(tmp_path / "s", "hash")
        cache = StreamCache.load(tmp_path / "s", model, "hash")
    assert texts == ["na", "ïve ", "漢"]


def test_without_a_compiler(work, tmp_path):
    """The same text from the plain cache, which is announced once, though it grows several times."""
    command = ["sample.py", "out/small", "--temperature=0", "--max_new_tokens=300"]
    whole = ok(*command, cwd=work)
    without = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run_script(*command, cwd=work, env=without)
    assert done.returncode == 0 and done.stdout == whole and done.stderr.count("decode.cpp could not be compiled") == 1
    whole = ok(*command, "--cache=stream", cwd=work)
    done = run_script(*command, "--cache=stream", cwd=work, env=without)
    assert done.returncode == 0 and done.stdout == whole and "stream cache: plain torch, slower" in done.stderr


def test_score(work, trained, tmp_path):
    """The stream's and the windows' loss of a text that fits the context are that of one forward pass."""
    model, tokenizer = trained
    text = "The list of objects is a list."
    tokens = torch.tensor([tokenizer.encode(text)])
    assert 8 < tokens.size(1) <= model.config.block_size
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    (tmp_path / "text.txt").write_text(text)
    for cache in ("exact", "stream"):
        out = ok("sample.py", "out/small", f"--score={tmp_path}/text.txt", f"--cache={cache}", cwd=work)
        assert float(out.split()[1]) == pytest.approx(loss, abs=2e-3) and f"{tokens.size(1) - 1} tokens" in out
    (tmp_path / "text.txt").write_text(text * 300)
    for cache in ("exact", "stream"):
        assert "tokens" in ok("sample.py", "out/small", f"--score={tmp_path}/text.txt", f"--cache={cache}", cwd=work)


def total_loss(model, tokens, window, stride):
    """By the definition: windows one by one, tokens one by one."""
    total, done = 0.0, 0
    for begin in range(0, len(tokens), stride):
        with torch.no_grad():
            log_p = model(torch.tensor([tokens[begin : begin + window]]))[0].log_softmax(-1)
        for at in range(done + 1, min(begin + window, len(tokens) - 1) + 1):
            total -= log_p[at - 1 - begin, tokens[at]].item()
            done = at
    return total


def test_windows_of_a_stride(trained):
    model, _ = trained
    for length, stride in ((2, 1), (32, 7), (33, 32), (34, 1), (65, 32), (65, 31), (100, 13)):
        tokens = torch.randint(model.config.vocab_size, (length,)).tolist()
        assert loss_of(model, tokens, "exact", stride) == pytest.approx(total_loss(model, tokens, 32, stride), rel=1e-5)


def test_score_of_documents(work, trained, tmp_path):
    """Each begins after an end token and its own is scored; JSONL, compressed or not, and the validation documents of a corpus."""
    model, tokenizer = trained
    texts, end = ["The list of objects. " * 9, "é", "A second one, of\ntwo lines."], tokenizer.end_token
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "some.jsonl").write_text(lines)
    (tmp_path / "some.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    documents = [[end, *tokenizer.encode(text), end] for text in texts]
    count, size = sum(len(tokens) - 1 for tokens in documents), sum(len(text.encode()) for text in texts)
    for options, stride, said in (([], 32, "none overlaps"), (["--stride=8"], 8, "the first 24 of a later one are context only")):
        total = sum(total_loss(model, tokens, 32, stride) for tokens in documents)
        expected = total / count, math.exp(total / count), total / math.log(2) / size
        for name in ("some.jsonl", "some.jsonl.gz"):
            out = ok("sample.py", "out/small", f"--score={tmp_path / name}", *options, cwd=work)
            numbers = re.match("loss (.*) nats a token, perplexity (.*), bits per byte ([0-9.]*), ", out).groups()
            assert [float(number) for number in numbers] == pytest.approx(expected, rel=1e-3)
            assert f", {count} tokens, 3 documents, " in out and said in out
    (tmp_path / "some.json").write_text(json.dumps([{"body": text} for text in texts]))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "some.parquet")
    for name in ("some.json", "some.parquet"):
        scored = ok("sample.py", "out/small", f"--score={tmp_path / name}", "--text_key=body", "--stride=8", cwd=work)
        assert scored == out
        said = fails("sample.py", "out/small", f"--score={tmp_path / name}", cwd=work)
        assert "--text_key=NAME takes another of its texts: body" in said and "--skip_bad" not in said
    assert run_script("sample.py", "out/small", "--score=-", "--stride=8", cwd=work, stdin=lines).stdout == out  # records are told
    (tmp_path / "one.txt").write_text(texts[0])
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress(texts[0].encode()))
    one = [ok("sample.py", "out/small", f"--score={tmp_path / name}", cwd=work) for name in ("one.txt", "one.txt.gz")]
    assert one[0] == one[1] and f"{len(tokenizer.encode(texts[0])) - 1} tokens, 1 document, " in one[0]
    (tmp_path / "book.pdf").write_bytes(b"%PDF-1.4")
    assert "is a .pdf file, which is not taken: `pdftotext" in fails("sample.py", "out/small", f"--score={tmp_path / 'book.pdf'}", cwd=work)
    corpus = Corpus(work / "docs")
    out = ok("sample.py", "out/small", "--score=docs", "--cache=stream", cwd=work)
    assert f"{corpus.meta['val']['tokens']:,} tokens, {corpus.meta['val']['documents']:,} documents" in out and "windows" not in out
    loss, bits = float(out.split()[1]), float(re.search("bits per byte ([0-9.]*)", out)[1])
    assert bits == pytest.approx(corpus.bits_per_byte(loss), rel=1e-3)  # as in metrics.jsonl


def test_the_lines_of_the_docs(work, tmp_path, monkeypatch):
    """The block of Python in docs/decoding.md runs as it stands and gives what sample.py writes."""
    block = re.search(r"(?:^    .*\n|^\n)*^    .*load\(.*\n(?:^    .*\n)*", (ROOT / "docs/decoding.md").read_text(), re.M)[0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/quickstart").symlink_to(work / "out/small")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(line.removeprefix("    ") for line in block.splitlines()), names)
    assert names["text"] == ok("sample.py", "out/quickstart", "--prompt=Return the", "--max_new_tokens=50", cwd=tmp_path)
    assert names["logits"].shape == (1, len(names["tokenizer"].encode("Return the")), names["model"].config.vocab_size)


def on_a_terminal(*args, cwd):
    """What a terminal shows of sample.py's standard output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *args], cwd=cwd, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return shown.decode("utf-8", "replace").replace("\r\n", "\n")


def test_a_terminal_shows_prompts_and_lines_and_a_file_does_not(work, tmp_path):
    (tmp_path / "prompts").write_text("def \nThe list\n")
    command = ["out/small", "--max_new_tokens=6", "--num_samples=2", f"--prompts={tmp_path}/prompts", "--top_k=1"]
    samples = ok("sample.py", *command, r"--separator=\n\0\n", cwd=work).split("\n\0\n")
    assert len(samples) == 4 and ok("sample.py", *command, "--quiet", cwd=work) == "\n".join(samples)
    framed = [prompt + text for prompt, text in zip(("def ", "def ", "The list", "The list"), samples)]
    assert on_a_terminal(*command, cwd=work) == ("\n" + "-" * 15 + "\n").join(framed) + "\n"
    assert on_a_terminal(*command, "--quiet", cwd=work) == "\n".join(samples) + "\n"


def test_odd_prompts(work, trained, tmp_path, capsys):
    model, tokenizer = trained
    few = dict(max_new_tokens=4, temperature=0)
    long = "word " * 100
    tokens = tokenizer.encode(long)
    (text,) = generate_many(model, tokenizer, [long], **few)
    assert f"a prompt has {len(tokens)} tokens: the last 32, the context, are read" in capsys.readouterr().err
    assert text == tokenizer.decode_bytes(generate(model, [tokens[-32:]], 4)[0].tolist()).decode("utf-8", "replace")
    prompts = "", "a", "<|endoftext|>"  # the beginning of a document, and plain text
    rows = [[tokenizer.end_token], *map(tokenizer.encode, prompts[1:])]
    expected = [tokenizer.decode_bytes(generate(model, [row], 4)[0].tolist()).decode("utf-8", "replace") for row in rows]
    assert generate_many(model, tokenizer, prompts, **few) == expected and len(rows[2]) > 1
    assert generate_many(model, tokenizer, ["a"], num_samples=3, max_new_tokens=0) == ["", "", ""]
    characters = tokenizers.Characters(["a", "b"], 2)
    with pytest.raises(ValueError, match="'é' is not among the 2"):
        generate_many(model, characters, ["ab", "aé"])
    again, _ = load(work / "out/small")
    assert not again.training and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_edges(work):
    assert ok("sample.py", "out/small", "--max_new_tokens=0", cwd=work) == ""
    assert ok("sample.py", "out/small", "--max_new_tokens=5", cwd=work) != ""
    ok("sample.py", "out/small", "--max_new_tokens=5", "--prompt_file=-", stdin="long prompt, 東京 " * 9000, cwd=work)
    ok("sample.py", "out/small", "--max_new_tokens=5", "--cache=stream", "--prompt_file=-", stdin="long prompt, 東京 " * 90, cwd=work)


def test_a_prompt_is_a_line(work, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("one\u2028line\r\n\nthird".encode())
    expected = [
        ok("sample.py", "out/small", "--max_new_tokens=5", f"--prompt={prompt}", cwd=work) for prompt in ("one\u2028line", "", "third")
    ]
    assert ok("sample.py", "out/small", "--max_new_tokens=5", f"--prompts={tmp_path}/prompts.txt", cwd=work) == "\n".join(expected)


def test_a_closed_stream(work):
    command = f"{sys.executable} {ROOT}/sample.py out/small --max_new_tokens=5 --seed=3"
    said = lambda how: subprocess.run(command + how, shell=True, cwd=work, capture_output=True, text=True)
    assert said(" >&-").returncode == 0 and said(" 2>&-").stdout == said("").stdout != ""
    assert said(" --prompt_file=- <&-").stdout == said(" --prompt_file=/dev/null").stdout
    assert said(" --interactive <&-").returncode == 0 and said(" --interactive <&-").stdout == ""


def test_nobody_takes_the_output(work):
    command = f"{sys.executable} {ROOT}/sample.py out/small --max_new_tokens=5 > /dev/full"
    done = subprocess.run(command, shell=True, cwd=work, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr


def test_arguments_from_python(trained):
    model, tokenizer = trained
    for wrong, said in (
        (dict(temperature=-1), "temperature=-1 is out of range: it must be 0 or more"),
        (dict(top_p=0), "top_p=0"),
        (dict(num_samples=0), "num_samples=0"),
        (dict(max_new_tokens=-1), "max_new_tokens=-1"),
        (dict(stop="end"), "a list of texts"),
        (dict(cache="fast"), "cache=fast is out of range: it must be one of exact, stream, none"),
        (dict(prompts="def"), "must be a list of texts"),
    ):
        with pytest.raises(UserError, match=said):
            generate_many(model, tokenizer, **dict(prompts=["def"]) | wrong)
    assert generate_many(model, tokenizer, []) == []


@pytest.mark.parametrize(
    "args, expected",
    [
        (["nowhere"], "no checkpoint in nowhere"),
        (["out/small", "--temperature=-1"], "--temperature=-1"),
        (["out/small", "--top_p=0"], "--top_p=0"),
        (["out/small", "--num_samples=0"], "--num_samples=0"),
        (["out/small", "--max_new_tokens=x"], "max_new_tokens"),
        (["out/small", "--prompt_file=absent"], "absent does not exist, and is to be read"),
        (["out/small", "--prompt=a", "--prompt_file=b"], "not both"),
        (["out/small", "--prompts=absent"], "absent"),
        (["out/small", "--score=/dev/null"], "at least 2"),
        (["out/small", "--score=absent.jsonl"], "absent.jsonl"),
        (["out/small", "--score=out"], "no corpus in out"),
        (["out/small", "--score=small.toml", "--stride=33"], "block_size, 32"),
        (["out/small", "--score=small.toml", "--stride=0"], "--stride=0"),
        (["out/small", "--stride=8"], "--stride is for --score: leave it out"),
        (["out/small", "--session=s"], "--cache=stream"),
        (["out/small", "--cache=stream", "--session=no/s"], "there is no"),
        (["out/small", "--score="], "names no file"),
        (["out/small", "--prompt_file="], "names no file"),
        (["out/small", "--score=out/small"], "no corpus in out/small: --score takes a file, or the folder of a corpus"),
        (["out/small", "--score=small.toml", "--temperature=1"], "--temperature is for drawing samples, and --score draws none"),
        (["out/small", "--score=small.toml", "--num_samples=2"], "--num_samples is for drawing samples"),
        (["out/small", "--text_key=body"], "--text_key is for --score"),
        (["out/small", "--score=small.toml", "--stride=8", "--cache=stream"], "--cache=stream has none"),
        (["out/small", "--interactive", "--num_samples=2"], "--num_samples"),
        (["out/small", "--prompts=/dev/null"], "no prompt"),
        (["out/small", "--stop="], "--stop"),
        (["out/small", "--device=abacus"], "abacus"),
    ],
)
def test_mistakes(work, args, expected):
    assert expected in fails("sample.py", *args, cwd=work)


def test_any_checkpoint_and_any_tokenizer(work, here):
    small = work / "out/small"
    step = small / "step_00000020.safetensors"
    options = ["--prompt=The", "--max_new_tokens=5", "--temperature=0"]
    assert ok("sample.py", small / "best.safetensors", *options, cwd=here) == ok("sample.py", small, *options, cwd=here)
    assert len(ok("sample.py", step, *options, cwd=here)) > 0
    assert "no checkpoint" in fails("sample.py", here / "small.toml", *options, cwd=here)
    (here / "a.jsonl").write_text("".join(f'{{"text": "the list {number} of names"}}\n' for number in range(50)))
    for number, source in enumerate((small, step, "docs")):
        ok("data/jsonl/prepare.py", "a.jsonl", f"--tokenizer={source}", f"--out_dir=c{number}", cwd=here)
    assert len({(here / f"c{number}/tokenizer.json").read_text() for number in range(3)}) == 1
