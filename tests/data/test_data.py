import bz2
import gzip
import json
import lzma
import math
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, fails, ok, shared_data

from common import UserError
from data import tokenizer as tokenizers
from data.corpus import Corpus, read_jsonl, unigram_and_bigram_loss
from data.python_code import prepare as python_code

WORDS = "the graph of a domain remembers what its features share and forgets the rest".split()


def write_jsonl(path, count=60, kind=str):
    generator = np.random.default_rng(0)
    with open(path, "w") as file:
        for number in range(count):
            body = " ".join(generator.choice(WORDS, 12))
            file.write(json.dumps({"text": f"{number} {body}" if kind is str else [str(number), "a title", body]}) + "\n")


def decoded(corpus, split):
    return list(corpus.documents(split))


def test_a_bpe_that_cannot_encode_every_text_is_refused():
    fields = tokenizers.BPE.train(["the graph of a domain"] * 9, 262).to_json()
    assert tokenizers.from_json(fields).decode_bytes(tokenizers.from_json(fields).encode("the é")) == "the é".encode()
    tokens = fields["tokens"]
    wrong = [{"tokens": wrong} for wrong in (tokens[1:], [*tokens[:-1], ""], [*tokens, "a"], [*tokens[:7], None, *tokens[8:]])]
    wrong += [{"pattern": wrong} for wrong in ("", "x", r"\s+|\p{L}+", fields["pattern"] + "*", "(?=a)|.+", "(")]
    for some in wrong:
        with pytest.raises(UserError, match="broken tokenizer"):
            tokenizers.from_json(fields | some)


def test_python_code(tmp_path, monkeypatch):
    for name in ("a.py", "deep/b.py", "deep/empty.py", "test/c.py"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text("" if "empty" in name else f"    # {name}\r\nx = 1\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "lib"))
    monkeypatch.setattr("sys.argv", ["prepare.py", "--tokenizer=char", f"--out_dir={tmp_path / 'code'}"])
    python_code.main()
    corpus = Corpus(tmp_path / "code")
    assert sorted(decoded(corpus, "train") + decoded(corpus, "val")) == ["    # a.py\nx = 1\n", "    # deep/b.py\nx = 1\n"]


def test_python_docs(work):
    corpus = Corpus(work / "docs")
    records = [json.loads(line)["text"] for line in open(work / "docs" / "documents.jsonl")]
    size = sum(len("\n".join(record).encode()) for record in records)
    assert 4000 < len(records) < 9000 and 1.5e6 < size < 4e6 and all(len(record) == 3 for record in records)
    assert ["json.decoder.JSONDecoder", "class JSONDecoder(object)"] in [record[:2] for record in records]
    texts = {"\n".join(record).strip() for record in records}
    train, val = set(decoded(corpus, "train")), set(decoded(corpus, "val"))
    assert train | val == texts and not train & val
    assert 0.003 < len(val) / len(texts) < 0.03
    assert corpus.meta["unigram_loss"] > corpus.meta["bigram_loss"] > 1
    assert corpus.meta["dtype"] == "uint16" and corpus.vocab_size == 300 and len(corpus.meta["sha256"]) == 64


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
@pytest.mark.parametrize("kind", [str, list])
def test_jsonl(tmp_path, tokenizer, kind):
    write_jsonl(tmp_path / "a.jsonl", 40, kind)
    write_jsonl(tmp_path / "b.jsonl", 60, kind)
    out = ok(
        "data/jsonl/prepare.py",
        "a.jsonl",
        "b.jsonl",
        "--out_dir=c",
        *(["--vocab_size=300"] if tokenizer == "bpe" else ["--tokenizer=char"]),
        "--val_fraction=0.1",
        cwd=tmp_path,
    )
    corpus = Corpus(tmp_path / "c")
    texts = [
        "\n".join(record) if isinstance(record := json.loads(line)["text"], list) else record
        for name in "ab"
        for line in open(tmp_path / f"{name}.jsonl")
    ]
    assert sorted(decoded(corpus, "train") + decoded(corpus, "val")) == sorted(texts)
    assert f"bigram {corpus.meta['bigram_loss']:.3f}" in out
    assert corpus.meta["val"]["bytes"] == sum(len(text.encode()) for text in decoded(corpus, "val"))
    assert corpus.val[-1] == corpus.tokenizer.end_token == corpus.vocab_size - 1


def test_compressed_jsonl(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 100)
    content = (tmp_path / "a.jsonl").read_bytes()
    compressed = {
        "gz": gzip.compress(content),
        "bz2": bz2.compress(content),
        "xz": lzma.compress(content),
        "zst": pyarrow.compress(content, "zstd", asbytes=True),
    }
    for suffix, data in compressed.items():
        (tmp_path / f"a.{suffix}").write_bytes(data)
        assert list(read_jsonl([tmp_path / f"a.{suffix}"])) == list(read_jsonl([tmp_path / "a.jsonl"]))
        (tmp_path / "half").write_bytes(data[: len(data) // 2])
        assert "half is damaged" in fails("data/jsonl/prepare.py", "half", "--out_dir=out", "--vocab_size=300", cwd=tmp_path)
        assert not any((tmp_path / "out").glob("*"))


def test_split_follows_the_text_and_not_its_place(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("".join(reversed(open(tmp_path / "a.jsonl").readlines())))
    for name in "ab":
        ok("data/jsonl/prepare.py", f"{name}.jsonl", f"--out_dir={name}", "--vocab_size=300", "--val_fraction=0.2", cwd=tmp_path)
    a, b = (sorted(decoded(Corpus(tmp_path / name), "val")) for name in "ab")
    assert a == b and 3 < len(a) < 25


def test_small_corpus_keeps_one_document_for_validation(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 5)
    ok("data/jsonl/prepare.py", "a.jsonl", "--out_dir=a", "--vocab_size=300", cwd=tmp_path)
    assert Corpus(tmp_path / "a").meta["val"]["documents"] == 1


def test_real_jsonl_and_published_embeddings(tmp_path):
    source = shared_data("cve")
    lines = open(source / "train.jsonl").readlines()[:2000]
    (tmp_path / "some.jsonl").write_text("".join(lines))
    ok("data/jsonl/prepare.py", "some.jsonl", "--out_dir=c", "--vocab_size=2000", cwd=tmp_path)
    assert Corpus(tmp_path / "c").meta["train"]["documents"] + Corpus(tmp_path / "c").meta["val"]["documents"] == 2000
    out = ok("build_laplacian.py", source / "embeddings.npy", "--out=l.parquet", cwd=tmp_path)
    assert "2 of 384 features are zero" in out


def cve_record(number, state="PUBLISHED", **cna):
    return {"dataType": "CVE_RECORD", "cveMetadata": {"cveId": f"CVE-2026-{number}", "state": state}, "containers": {"cna": cna}}


def described(text, lang="en"):
    return {"descriptions": [{"lang": lang, "value": text}]}


def test_cve_release_zip(tmp_path):
    records = [cve_record(number, title="T", **described(f"Overflow number {number} in the parser allows a crash.")) for number in range(8)]
    records += [
        cve_record(8, "REJECTED", **described("withdrawn")),
        cve_record(9),
        cve_record(10, **described("nur deutsch", "de")),
        cve_record(11, **described("An untitled flaw.", "en-US")),
        {"cveMetadata": {"cveId": "CVE-2026-12", "state": "REJECTED"}},  # without the container
        {"cveMetadata": {"cveId": "CVE-2026-13", "state": "RESERVED"}, "containers": {}},
        cve_record(14, descriptions=[{"lang": lang, "value": f"In {lang}."} for lang in ("en", "de", "en-GB")]),
    ]
    with zipfile.ZipFile(tmp_path / "cves.zip", "w") as inner:
        inner.writestr("cves/deltaLog.json", "[]")
        for number, record in enumerate(records):
            inner.writestr(f"cves/2026/CVE-2026-{number}.json", json.dumps(record))
        inner.writestr("__MACOSX/cves/2026/._CVE-2026-0.json", b"\0\5\x16\7")
    with zipfile.ZipFile(tmp_path / "release.zip", "w") as outer:
        outer.write(tmp_path / "cves.zip", "cves.zip")
        outer.writestr("__MACOSX/._cves.zip", b"\0\5\x16\7")
    for source in ("cves.zip", "release.zip"):
        out = ok("data/cve/prepare.py", source, f"--out_dir={source[:-4]}", "--vocab_size=300", cwd=tmp_path)
        assert "1 not a CVE record" in out and "2 rejected" in out and "1 reserved" in out and "2 without a description" in out
        assert f"{1 + (source == 'release.zip')} files of other programs" in out
        kept = [json.loads(line)["text"] for line in open(tmp_path / source[:-4] / "documents.jsonl")]
        assert len(kept) == 10 and ["CVE-2026-11", "(no title)", "An untitled flaw."] in kept
        assert ["CVE-2026-14", "(no title)", "In en.\nIn en-GB."] in kept


def test_one_odd_record_does_not_stop_everything(tmp_path):
    (tmp_path / "cves").mkdir()
    for number in range(4):
        (tmp_path / "cves" / f"{number}.json").write_text(json.dumps(cve_record(number, **described(f"Flaw number {number}."))))
    (tmp_path / "cves" / "bad.json").write_text(json.dumps({"cveMetadata": {"cveId": "CVE-2026-9", "state": "PUBLISHED"}}))
    (tmp_path / "cves" / "cut.json").write_text('{"cveMetadata":')
    (tmp_path / "cves" / "._0.json").write_bytes(b"\0\5\x16\7")
    assert (
        "bad.json: not a CVE record" in (said := fails("data/cve/prepare.py", "cves", "--out_dir=c", cwd=tmp_path)) and "--skip_bad" in said
    )
    out = ok("data/cve/prepare.py", "cves", "--out_dir=c", "--vocab_size=300", "--skip_bad", cwd=tmp_path)
    assert "1 files of other programs" in out and "2 broken (such as cves/bad.json)" in out

    write_jsonl(tmp_path / "a.jsonl", 5)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": null}\n{"title": "no text"}\n{"text": "whole"}\n{"text": "cut\n')
    assert "a.jsonl, line 6" in fails("data/jsonl/prepare.py", "a.jsonl", "--out_dir=j", cwd=tmp_path)
    out = ok("data/jsonl/prepare.py", "a.jsonl", "--out_dir=j", "--vocab_size=300", "--skip_bad", cwd=tmp_path)
    assert "3 broken (such as a.jsonl, line 6)" in out
    assert Corpus(tmp_path / "j").meta["train"]["documents"] + Corpus(tmp_path / "j").meta["val"]["documents"] == 6
    (tmp_path / "many.jsonl").write_text('{"text": "a"}\n' + "x\n" * 1001)
    assert "more than 1,000 broken" in fails("data/jsonl/prepare.py", "many.jsonl", "--out_dir=m", "--skip_bad", cwd=tmp_path)


def test_long_runs_of_blanks(tmp_path):
    texts = [" " * 300_000, "a" + "\t " * 100_000 + "b", "short  run"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"x{text}y"}) + "\n" for text in texts))
    ok("data/jsonl/prepare.py", "a.jsonl", "--out_dir=c", "--vocab_size=300", cwd=tmp_path)
    corpus = Corpus(tmp_path / "c")
    assert sorted(decoded(corpus, "train") + decoded(corpus, "val")) == sorted(f"x{text}y" for text in texts)


def test_real_cve_folder(tmp_path):
    ok("data/cve/prepare.py", shared_data("cve_v5"), "--out_dir=c", "--vocab_size=600", cwd=tmp_path)
    counts = Corpus(tmp_path / "c").meta
    assert counts["train"]["documents"] + counts["val"]["documents"] == len(list(shared_data("cve_v5").glob("*.json")))


def test_shakespeare_from_a_file(tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 40
    (tmp_path / "input.txt").write_text(text)
    ok("data/shakespeare_char/prepare.py", "input.txt", "--out_dir=s", cwd=tmp_path)
    corpus = Corpus(tmp_path / "s")
    assert decoded(corpus, "train") + decoded(corpus, "val") == [text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]]
    assert corpus.vocab_size == len(set(text)) and corpus.tokenizer.end_token is None


def test_whole_shakespeare_is_as_in_nanogpt(tmp_path):
    ok("data/shakespeare_char/prepare.py", shared_data("tinyshakespeare.txt"), "--out_dir=s", cwd=tmp_path)
    corpus = Corpus(tmp_path / "s")
    assert (len(corpus.train), len(corpus.val), corpus.vocab_size) == (1003854, 111540, 65)


def test_openwebtext_from_a_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    texts = [json.loads(line)["text"] for line in open(tmp_path / "a.jsonl")]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        ok("data/openwebtext/prepare.py", name, "--tokenizer=bpe", "--vocab_size=300", f"--out_dir={name}.out", cwd=tmp_path)
        corpus = Corpus(tmp_path / f"{name}.out")
        assert sorted(decoded(corpus, "train") + decoded(corpus, "val")) == sorted(texts)


def test_baselines_by_definition():
    generator = np.random.default_rng(0)
    train, val, V = generator.integers(0, 7, 300), generator.integers(0, 7, 50), 9
    p = [(np.sum(train == token) + 1) / (300 + V) for token in range(V)]

    def bigram(k):
        return np.mean(
            [
                -math.log((np.sum((train[:-1] == a) & (train[1:] == b)) + k * p[b]) / (np.sum(train == a) + k))
                for a, b in zip(val[:-1], val[1:])
            ]
        )

    unigram, best = unigram_and_bigram_loss(train, val, V)
    assert unigram == pytest.approx(np.mean([-math.log(p[token]) for token in val]))
    assert best == pytest.approx(min(bigram(2.0**power) for power in range(13)))


def test_bpe_gives_any_text_back():
    text = "naïve café, 東京 🙂 \x00 <|endoftext|> \n\t x = [1, 2]"
    trained = tokenizers.BPE.train(iter([text * 3, "a b c"]), 280)
    for tokenizer in (trained, tokenizers.from_json(json.loads(json.dumps(trained.to_json())))):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode_bytes(tokens).decode() == text and max(tokens) < tokenizer.end_token


def test_lsa_features_have_neighbours(work):
    embeddings = np.load(work / "docs" / "embeddings.npy")
    assert embeddings.shape == (Corpus(work / "docs").meta["train"]["documents"], 32) and embeddings.dtype == np.float32
    lengths = np.linalg.norm(embeddings, axis=1)
    assert np.allclose(lengths[lengths > 0], 1, atol=1e-5)
    unit = embeddings / np.linalg.norm(embeddings, axis=0)
    assert np.sort(unit.T @ unit - np.eye(32), axis=1)[:, -1].min() > 0.05


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"text": "fine"}\n{"text": 3}\n', "line 2"),
        ('{"text": "fine"}\n\n{"text": "cut\n', "line 3"),
        ('["a", "b"]\n', "line 1"),
        ("", "empty"),
        ('{"text": ""}\n', "empty"),
        ('{"text": "only one"}\n', "one document"),
    ],
)
def test_bad_jsonl(tmp_path, content, expected):
    (tmp_path / "bad.jsonl").write_text(content)
    assert expected in fails("data/jsonl/prepare.py", "bad.jsonl", "--out_dir=out", "--vocab_size=300", cwd=tmp_path)
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "script, args, expected",
    [
        ("data/jsonl/prepare.py", ["absent.jsonl", "--out_dir=out"], "absent.jsonl"),
        ("data/jsonl/prepare.py", ["--out_dir=out"], "FILE.jsonl"),
        ("data/jsonl/prepare.py", ["a.jsonl", "--out_dir=out", "--tokenizer=gpt99"], "gpt99"),
        ("data/jsonl/prepare.py", ["a.jsonl", "--out_dir=out", "--vocab_size=12"], "--vocab_size=12"),
        ("data/jsonl/prepare.py", ["a.jsonl", "--out_dir=out", "--tokenizer=char", "--vocab_size=300"], "leave it out"),
        ("data/jsonl/prepare.py", ["a.jsonl", "--out_dir=out", "--val_fraction=1.5"], "--val_fraction=1.5"),
        ("data/cve/prepare.py", ["absent.zip", "--out_dir=out"], "absent.zip"),
        ("data/cve/prepare.py", ["a.jsonl", "--out_dir=out"], "zip"),
        ("data/shakespeare_char/prepare.py", ["empty.txt", "--out_dir=out"], "empty"),
        ("data/openwebtext/prepare.py", ["broken.parquet", "--tokenizer=bpe", "--out_dir=out"], "broken.parquet"),
        ("data/jsonl/prepare.py", ["folder", "--out_dir=out"], "folder is not a file"),
        ("data/jsonl/prepare.py", ["a.jsonl", "--out_dir=empty.txt"], "empty.txt"),
        ("data/jsonl/prepare.py", ["a.jsonl", "--out_dir=out", "--vocab_size=5000000000"], "--vocab_size"),
        ("data/cve/prepare.py", ["flipped.zip", "--out_dir=out"], "flipped.zip"),
        ("data/openwebtext/prepare.py", ["numbers.parquet", "--tokenizer=bpe", "--out_dir=out"], "numbers.parquet"),
        ("data/embed.py", ["nowhere"], "no corpus in nowhere"),
        ("data/embed.py", ["{work}/docs", "--dim=0"], "--dim=0"),
        ("data/embed.py", ["{work}/docs"], "exists already"),
    ],
)
def test_mistakes(tmp_path, work, script, args, expected):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "flipped.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("CVE-1.json", json.dumps(cve_record(1, **described("text " * 99))))
    content = bytearray((tmp_path / "flipped.zip").read_bytes())
    content[45:60] = b"\xff" * 15
    (tmp_path / "flipped.zip").write_bytes(content)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert expected in fails(script, *[arg.format(work=work) for arg in args], cwd=tmp_path)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_no_file_is_overwritten_unasked(tmp_path):
    (tmp_path / "input.txt").write_text("some text " * 50)
    for name in ("meta.json", "tokenizer.json", "train.bin", "val.bin"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / name).write_text("mine")
        assert name in fails("data/shakespeare_char/prepare.py", "input.txt", "--out_dir=theirs", cwd=tmp_path)
        assert [path.read_text() for path in (tmp_path / "theirs").iterdir()] == ["mine"]
        (tmp_path / "theirs" / name).unlink()


def test_a_failed_prepare_leaves_no_folder(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "CVE-1.json").write_text(json.dumps(cve_record(1, **described("a lone \ud800 surrogate"))))
    assert "one document" in fails("data/cve/prepare.py", "records", "--out_dir=new/deep", cwd=tmp_path)
    assert not (tmp_path / "new" / "deep").exists()


def test_documents_of_one_running_text_and_of_a_damaged_one(tmp_path):
    (tmp_path / "input.txt").write_text("some text " * 50)
    ok("data/shakespeare_char/prepare.py", "input.txt", "--tokenizer=bpe", "--vocab_size=260", "--out_dir=s", cwd=tmp_path)
    assert len(decoded(Corpus(tmp_path / "s"), "train")) == 1
    np.full((tmp_path / "s" / "train.bin").stat().st_size // 2, 0xFF, np.uint16).tofile(tmp_path / "s" / "train.bin")
    assert "damaged corpus" in fails("data/embed.py", "s", "--dim=2", cwd=tmp_path)
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    for name, value in (("dtype", "U"), ("dtype", ["uint16"]), ("sha256", None), ("vocab_size", "260"), ("val", {}), ("train", [])):
        (tmp_path / "s" / "meta.json").write_text(json.dumps(meta | {name: value}))
        with pytest.raises(UserError, match="damaged corpus"):
            Corpus(tmp_path / "s")
    (tmp_path / "s" / "meta.json").write_text(json.dumps({name: value for name, value in meta.items() if name != "sha256"}))
    with pytest.raises(UserError, match="damaged corpus"):
        Corpus(tmp_path / "s")


def test_a_corpus_is_not_overwritten_unasked(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl", 30)
    prepare = ["data/jsonl/prepare.py", "--out_dir=c", "--vocab_size=300"]
    ok(*prepare, "a.jsonl", cwd=tmp_path)
    before = (tmp_path / "c" / "train.bin").read_bytes()
    assert "--overwrite" in fails(*prepare, "b.jsonl", cwd=tmp_path)
    assert (tmp_path / "c" / "train.bin").read_bytes() == before
    ok(*prepare, "b.jsonl", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "c" / "train.bin").read_bytes() != before


def test_a_full_disk_leaves_the_embeddings_of_before(work, tmp_path):
    docs = shutil.copytree(work / "docs", tmp_path / "docs")
    before = {path.name: path.read_bytes() for path in docs.iterdir()}
    command = f"ulimit -f 20; {sys.executable} {ROOT}/data/embed.py docs --dim=16 --overwrite"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert line.startswith("embed.py: error: [Errno 27] docs/lsa.npz could not be written: File too large, which `ulimit -f` allows")
    assert {path.name: path.read_bytes() for path in docs.iterdir()} == before
