"""What people bring: one rule for text, and every kind of file, folder and data set that data/text/prepare.py takes or refuses."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
from argparse import Namespace
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, fails, run_script

import common
from common import UserError, read_text
from data import corpus, sources
from data.corpus import Corpus
from data.tokenizer import BPE

CODE = [f"    def f{number}(self):\r\n\treturn {number}\n\n" for number in range(8)]
MARKED = {
    "utf-8": b"\xef\xbb\xbf",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32-le": b"\xff\xfe\0\0",
    "utf-32-be": b"\0\0\xfe\xff",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(*args, by="text", out="out"):
    """Run a prepare.py within this process, into a fresh folder: its corpus, and what it printed."""
    script = importlib.import_module(f"data.{by}.prepare")
    printed, options = io.StringIO(), [*map(str, args), f"--out_dir={out}", "--overwrite"]
    if args[:1] != ("nano",):  # whose tokens and split stay
        made = by != "shakespeare_char" and not any(option.startswith("--tokenizer=") and option != "--tokenizer=bpe" for option in options)
        options += ["--val_fraction=0.3", *["--vocab_size=300"] * made]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", *options])
        patch.setattr(sys, "stdout", printed)
        script.main()
    return SimpleNamespace(corpus=Corpus(out), said=printed.getvalue(), texts=texts(out))


def texts(folder):
    """The documents of a corpus, in the order of their text."""
    return sorted(text for split in ("train", "val") for text in Corpus(folder).documents(split))


def refused(*args, out="new", **more):
    """The line that a prepare.py ends with; nothing is left of what it may have written."""
    with pytest.raises(UserError) as error:
        prepare(*args, out=out, **more)
    assert not os.path.exists(out) and "\n" not in str(error.value)
    return str(error.value)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def records(name="text"):
    return [{name: text, "id": number} for number, text in enumerate(CODE)]


def test_a_hub_that_does_not_answer_is_given_up_at_once(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9"} | {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    for name in ("nots", "no/nots"):
        done = run_script("data/text/prepare.py", name, "--out_dir=c", cwd=tmp_path, env=environment)
        assert done.returncode == 2 and done.stderr == (
            f"prepare.py: error: there is no file or folder {name}, and data set {name!r} could not be loaded (the hub does not answer, "
            "and its cache here does not have it): give a local FILE\n"
        )
    assert not os.path.exists(tmp_path / "c")


@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_a_text_is_the_same_in_every_encoding_and_with_every_line_end(place, monkeypatch, piece):
    monkeypatch.setattr(common, "TEXT_PIECE", piece)
    text = "  first 東京\n\tsecond é 🙂\n\n  \n last \n"
    for end in ("\n", "\r\n", "\r"):
        for encoding, mark in {**MARKED, "utf8": b""}.items():
            (place / "a.txt").write_bytes(mark + text.replace("\n", end).encode(encoding))
            assert read_text(place / "a.txt") == text
    for content, said in (
        (b"caf\xe9 au lait", "UTF-8 text: byte 0xe9 at offset 3: convert"),
        (b"\xef\xbb\xbfa long line\xff", "0xff at offset 14"),
        ("plain".encode("utf-16-le"), "a zero byte at offset 1 (not text at all, or UTF-16 without"),
        (b"\xff\xfea\0b", "UTF-16-LE text: byte 0x62 at offset 4"),
        (b"cut \xe6\x9d", "0xe6 at offset 4"),
    ):
        (place / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match="^a.txt is no") as error:
            read_text("a.txt")
        assert said in str(error.value)


def test_every_reader_reads_text_by_the_one_rule(place):
    import sample
    from training.config import read_settings

    def written(text, name="a.txt", encoding="utf-16-le"):
        (place / name).write_bytes(MARKED[encoding] + text.replace("\n", "\r\n").encode(encoding))
        return place / name

    args = dict(prompts=None, prompt_file=None, prompt=None)
    assert sample.prompts_of(Namespace(**args | {"prompt_file": written(" a\n b\n")})) == [" a\n b\n"]
    assert sample.prompts_of(Namespace(**args | {"prompts": written(" a\n\n b\n")})) == [" a", "", " b"]
    assert read_settings(written('data_dir = "x"\nseed = 3\n')) == {"data_dir": "x", "seed": 3}
    for encoding in MARKED:
        for end in ("\n", "\r"):
            lines = written("".join(json.dumps(record) + end for record in records()), "a.jsonl", encoding)
            assert list(sources.read_jsonl([lines])) == CODE  # line ends inside a record stay
        done = prepare(written(" one\n\ttwo\n" * 9, encoding=encoding), by="shakespeare_char")
        assert "".join([*done.corpus.documents("train"), *done.corpus.documents("val")]) == " one\n\ttwo\n" * 9
    lines = place / "joined.jsonl"
    lines.write_bytes(b"".join(MARKED["utf-8"] + json.dumps(record).encode() + b"\r\n" for record in records()))
    assert list(sources.read_jsonl([lines])) == CODE
    os.mkdir("cves")
    for number in range(3):
        value = {"descriptions": [{"lang": "en", "value": f" Flaw {number}.\r\n"}]}
        record = {"cveMetadata": {"cveId": f"CVE-2026-{number}", "state": "PUBLISHED"}, "containers": {"cna": value}}
        written(json.dumps(record, indent=1), f"cves/{number}.json")
    assert prepare("cves", by="cve").texts == [f"CVE-2026-{number}\n(no title)\nFlaw {number}." for number in range(3)]


def test_nothing_is_stripped_from_records(place):
    write_lines(
        place / "a.jsonl",
        [*records(), {"text": ["id", " title", "  body\r\n"]}, {"text": " \n\t"}, {"text": ["", ""]}, {"text": "\ufeffx"}],
    )
    for by in ("jsonl", "text", "openwebtext"):
        tokenizer = ["--tokenizer=bpe"] if by == "openwebtext" else []
        assert prepare("a.jsonl", *tokenizer, by=by).texts == sorted([*CODE, "id\n title\n  body\r\n", "\ufeffx"])
    (place / "bad.jsonl").write_bytes(b'{"text": "fine"}\r\n{"text": "caf\xe9"}\r\n{"text": "also"}\r\n')
    assert "bad.jsonl, line 2: byte 0xe9 is not UTF-8" in refused("bad.jsonl")
    assert prepare("bad.jsonl", "--skip_bad").texts == ["also", "fine"]


def test_compressed_and_piped(place):
    write_lines(place / "a.jsonl", records())
    (place / "t.txt").write_text("one\n\ntwo\n\nthree\n")
    for ending, compress in (
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", lambda x: pyarrow.compress(x, "zstd", asbytes=True)),
    ):
        (place / f"a.jsonl.{ending}").write_bytes(compress((place / "a.jsonl").read_bytes()))
        (place / f"t.txt.{ending}").write_bytes(compress((place / "t.txt").read_bytes()))
        assert prepare(f"a.jsonl.{ending}").texts == CODE
        assert prepare(f"t.txt.{ending}", r"--split_on=\n\n").texts == ["one", "three\n", "two"]
    pyarrow.parquet.write_table(pyarrow.table({"text": CODE}), "a.parquet")

    def piped(content, *args, **more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            return prepare("-", *args, **more)

    for by, name in (("jsonl", "a.jsonl"), ("text", "a.jsonl.gz"), ("text", "a.parquet")):
        done = piped((place / name).read_bytes(), by=by)
        assert done.texts == CODE and done.corpus.meta["source"] == "standard input"
    assert piped(json.dumps(records()).encode()).texts == CODE
    assert piped(b"one;two;three", "--split_on=;").texts == ["one", "three", "two"]
    os.mkfifo("fifo")
    for content, by in (
        (b"".join(path.read_bytes() for path in [place / "a.jsonl"]), "jsonl"),
        ((place / "a.jsonl.xz").read_bytes(), "text"),
    ):
        threading.Thread(target=(place / "fifo").write_bytes, args=(content,)).start()
        assert prepare("fifo", by=by).texts == CODE
    assert not [name for name in os.listdir("out") if name.startswith(".")]
    with pytest.raises(UserError, match="^standard input, line 1: "):
        piped(b"{broken\n", by="jsonl", out="new")
    assert not os.path.exists("new")


def test_shapes_of_json(place, monkeypatch):
    whole = json.dumps(records())
    for name, content in (
        ("array", whole),
        ("spread", json.dumps(records(), indent=4)),
        ("texts", json.dumps(CODE)),
        ("lines", "".join(json.dumps(record) + "\n" for record in records())),
        ("objects", "\n".join(json.dumps(record, indent=1) for record in records())),
    ):
        (place / f"{name}.json").write_text(content)
        assert prepare(f"{name}.json").texts == CODE, name
        for size in (1, 7, 100):
            pieces = (content[at : at + size] for at in range(0, len(content), size))
            assert [sources.record_text(value) for value in sources.json_values(pieces, name)] == CODE
    (place / "misnamed.jsonl").write_text(whole)
    assert prepare("misnamed.jsonl").texts == CODE
    for content, said in (
        (json.dumps({"version": "1", "data": records()}), "the records of its list 'data' are taken out by `jq -c '.data[]'"),
        (json.dumps({"name": "x"}, indent=1), "there is no 'text' in it"),
        (whole[:-9], "record 8 is broken JSON"),
        (whole[:-1], "record 9 is broken JSON"),
        (whole + "x", "something follows the end of its array, after record 8"),
        (whole.replace('"id": 3', '"id" 3'), "record 4 is broken JSON: Expecting ':'"),
        (whole.replace('"id": 3', '"text": null'), "record 4: null is neither a text nor"),
        ("[" * 100_000, "record 1 is broken JSON"),
        ("[]", "the corpus is empty"),
    ):
        (place / "a.json").write_text(content)
        assert said in refused("a.json")
    (place / "a.json").write_text(whole.replace('"id": 3', '"text": null'))
    assert prepare("a.json", "--skip_bad").texts == CODE[:3] + CODE[4:]
    monkeypatch.setattr(sources, "LONGEST", 1000)
    with pytest.raises(UserError, match="record 1 is longer than 1,000 characters"):
        list(sources.json_values(iter(["[{"] + ['"a": "b", '] * 200), "a.json"))


def test_the_key_of_the_text(place):
    write_lines(place / "a.jsonl", records("content"))
    (place / "a.json").write_text(json.dumps(records("content")))
    columns = {"id": list(range(8)), "source": ["web"] * 8, "content": CODE, "parts": [["a", text] for text in CODE]}
    pyarrow.parquet.write_table(pyarrow.table(columns), "a.parquet", row_group_size=3)
    datasets.Dataset.from_dict(columns).save_to_disk("a.set")
    for name in ("a.jsonl", "a.json", "a.parquet", "a.set"):
        assert "--text_key=NAME takes another of its texts: content" in refused(name)
        assert prepare(name, "--text_key=content").texts == CODE
    assert prepare("a.parquet", "--text_key=parts").texts == ["a\n" + text for text in CODE]
    assert "column 'id' holds int64" in refused("a.parquet", "--text_key=id")
    odd = pyarrow.array([b"fine", None, b"\xff", b"also"])
    for kind in (pyarrow.binary(), pyarrow.large_string(), pyarrow.string()):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": odd.view(pyarrow.binary()).cast(kind, safe=False) if kind != pyarrow.binary() else odd}), "odd.parquet"
        )
        assert "odd.parquet, row 2: null is" in refused("odd.parquet")
        done = prepare("odd.parquet", "--skip_bad")
        assert done.texts == ["also", "fine"] and "2 broken (such as odd.parquet, row 2)" in done.said
    content = (place / "a.parquet").read_bytes()
    for damaged in (content[:-9], content.replace(b"content", b"cont\x81nt")):
        (place / "cut.parquet").write_bytes(damaged)
        assert "cut.parquet is not a whole parquet file" in refused("cut.parquet")


def test_files_of_text_and_folders_of_them(place):
    (place / "t.txt").write_bytes(b"\xef\xbb\xbf  one\r\n\r\ntwo\r\n\r\n\r\nthree\r\n")
    done = prepare("t.txt")
    text = "  one\n\ntwo\n\n\nthree\n"  # 19 characters
    assert [list(done.corpus.documents(split)) for split in ("train", "val")] == [[text[:13]], [text[13:]]]
    for option in (r"\n\n", "\n\n", r"\r\n\r\n"):
        assert prepare("t.txt", f"--split_on={option}").texts == sorted(["  one", "two", "\nthree\n"])
    (place / "e.md").write_text("a<|endoftext|>b — é<|endoftext|><|endoftext|> \n")
    assert prepare("e.md", "--split_on=<|endoftext|>").texts == ["a", "b — é"]
    assert prepare("e.md", "--split_on= — ").texts == ["a<|endoftext|>b", "é<|endoftext|><|endoftext|> \n"]
    for option, said in (("--split_on=", "is empty"), ("--split_on=\\", "not understood")):
        assert said in refused("t.txt", option)
    files = {
        "b.py": CODE[0].encode(),
        "a.md": b"# A\n",
        "deep/er/c.txt.gz": gzip.compress(b"packed"),
        "LICENSE": b"licence",
        "blank.txt": b" \n",
        "wide.txt": MARKED["utf-16-be"] + "wide".encode("utf-16-be"),
        "d.json": json.dumps(records()[1:3]).encode(),
        "package.json": b'{"name": "x"}',
        "pic.png": b"\x89PNG\r\n\x1a\n\0\0",
        "paper.pdf": b"%PDF-1.4",
        "noname": b"PK\3\4",
        ".git/config": b"x",
        "deep/.hidden": b"x",
        "._b.py": b"x",
        "__MACOSX/b.py": b"x",
    }
    expected = sorted([CODE[0].replace("\r\n", "\n"), "# A\n", "packed", "licence", "wide", *CODE[1:3]])
    outs = []
    for folder, order in (("one", list(files)), ("two", list(files)[::-1])):  # the file system's order does not matter
        for name in order:
            (place / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (place / folder / name).write_bytes(files[name])
        done = prepare(folder, out=f"{folder}/made")
        done = prepare(folder, out=f"{folder}/made")  # what it made itself is not read
        assert done.texts == expected
        left_out = "2 files of other programs, 2 hidden files, 1 JSON files without records, 1 .zip files, 1 .pdf files, 1 binary files"
        assert sorted(left_out.split(", ")) == sorted(done.said.splitlines()[-1].removeprefix("left out: ").split(", "))
        assert done.corpus.meta["source"] == f"{folder} (7 files)"
        outs.append([(place / folder / "made" / name).read_bytes() for name in ("train.bin", "val.bin", "tokenizer.json")])
    assert outs[0] == outs[1]
    write_lines(place / "a.jsonl", records()[3:5])
    assert prepare("one", "a.jsonl", "t.txt").texts == sorted([*expected, *CODE[3:5], text])
    os.mkdir("single")
    (place / "single" / "t.txt").write_text(text)
    assert prepare("single").texts == prepare("t.txt").texts


def test_what_is_not_taken_and_why(place, monkeypatch):
    write_lines(place / "a.jsonl", records())
    for name in ("a.docx", "a.zip", "a.epub", "a.csv", "a.xlsx", "a.tar.gz", "sub/a.txt", "latin/a.txt", "latin/b.txt"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes({"latin/b.txt": b"caf\xe9"}.get(name, b"plain"))
    for name in ("empty", "hidden/.git", "made"):
        (place / name).mkdir(parents=True)
    (place / "noname").write_bytes(b"%PDF-1.7")
    (place / "dangling").symlink_to("nowhere")
    (place / "linked").mkdir()
    (place / "linked" / "a.txt").symlink_to("../nowhere")
    (place / "twice").mkdir()
    (place / "twice" / "b.jsonl").symlink_to("../a.jsonl")
    (place / "loop").mkdir()
    (place / "loop" / "again").symlink_to(".")
    prepare("a.jsonl", out="made")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for args, said in (
        (["a.docx"], "a.docx is a .docx file, which is not taken: `pandoc"),
        (["a.jsonl", "a.zip"], "unpack it"),
        (["a.epub"], "pandoc"),
        (["a.csv"], "read_csv('a.csv').to_parquet"),
        (["a.xlsx"], "read_excel"),
        (["a.tar.gz"], "a .tar file, which is not taken: unpack"),
        (["noname"], "`pdftotext noname NEW.txt`"),
        (["absent.txt"], "absent.txt does not exist"),
        (["no/such/folder"], "no/such/folder does not exist"),
        (["nobody/nothing"], "there is no file or folder nobody/nothing, and data set 'nobody/nothing' could not be loaded"),
        (["dangling"], "dangling is a link that leads nowhere"),
        (["linked"], "linked/a.txt: a link that leads nowhere"),
        (["empty"], "empty holds no file that is taken"),
        (["hidden"], "holds no file that is taken (left out: 1 hidden files)"),
        (["sub", "sub/a.txt"], "sub/a.txt is in sub, which is given, too: sources must not overlap"),
        (["sub/a.txt", "sub"], "sub/a.txt is in sub, which is given, too: sources must not overlap"),
        (["a.jsonl", "./a.jsonl"], "a.jsonl is given twice: sources must not overlap"),
        (["a.jsonl", "twice"], "twice/b.jsonl and a.jsonl are the same"),
        (["loop"], "loop/again and loop are the same"),
        (["made"], "made is a prepared corpus"),
        (["a.jsonl", "--split_on=x"], "--split_on is for files of text"),
        (["sub/a.txt", "--text_key=body"], "--text_key is for records"),
        (["latin"], "latin/b.txt is no UTF-8 text: byte 0xe9 at offset 3"),
    ):
        assert said in refused(*args), args
    assert prepare("latin", "a.jsonl", "--skip_bad").texts == sorted([*CODE, "plain"])
    (place / "linked" / "b.txt").write_text("whole")
    assert prepare("linked", "a.jsonl", "--skip_bad").texts == sorted([*CODE, "whole"])

    def forbidden(path, *args, **more):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "opened", forbidden)
    assert "sub/a.txt: Permission denied" in refused("sub")


def test_data_sets_saved_on_disk(place):
    whole = datasets.Dataset.from_list(records())
    whole.save_to_disk("one")
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk("splits")
    datasets.DatasetDict({"only": whole.shuffle(seed=1)}).save_to_disk("only")
    datasets.DatasetDict({"a": whole, "b": whole}).save_to_disk("two")
    for name in ("one", "splits", "only"):
        assert prepare(name).texts == CODE
    assert "1 splits that are not train" in prepare("splits").said
    assert "two has the splits a, b" in refused("two")
    for path in (place / "one").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    assert "one is a damaged data set" in refused("one")


def test_a_folder_of_nanogpt(place):
    os.mkdir("nano")
    text = "hello nano gpt\n" * 40
    characters = sorted(set(text))
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    tokens = np.array([meta["stoi"][c] for c in text], np.uint16)
    for name, content in {"train.bin": tokens[:500].tobytes(), "val.bin": tokens[500:].tobytes(), "meta.pkl": pickle.dumps(meta)}.items():
        (place / "nano" / name).write_bytes(content)
    done = prepare("nano")
    assert done.corpus.train.tolist() == tokens[:500].tolist() and done.corpus.val.tolist() == tokens[500:].tolist()
    assert [list(done.corpus.documents(split)) for split in ("train", "val")] == [[text[:500]], [text[500:]]]
    assert done.corpus.meta["val"] == {"documents": 1, "tokens": 100, "bytes": 100} and done.corpus.tokenizer.tokens == characters

    class Harm:
        def __reduce__(self):
            return os.mkdir, ("harm",)

    for content, said in (
        (pickle.dumps({"vocab_size": 2, "itos": Harm()}), "it would run posix.mkdir"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: "a"}}), "KeyError"),
        (pickle.dumps({"vocab_size": 1, "itos": {0: "word"}}), "single characters"),
        (pickle.dumps({"vocab_size": 3, "itos": dict(enumerate("abc"))}), "past the 3 of its vocabulary"),
        (b"no pickle", "meta.pkl is not what nanoGPT writes"),
    ):
        (place / "nano" / "meta.pkl").write_bytes(content)
        assert said in refused("nano") and not os.path.exists("harm")
    (place / "nano" / "meta.pkl").unlink()
    write_lines(place / "a.jsonl", records())
    end = prepare("a.jsonl", out="bpe").corpus.tokenizer.end_token
    for split in ("train", "val"):  # without meta.pkl the tokens are those of the named tokenizer, GPT-2's unless another is named
        np.array([72, 105, end, 72, 111, end], np.uint16).tofile(f"nano/{split}.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "named_tokenizer", lambda name: Corpus("bpe").tokenizer if name == "gpt2" else 1 / 0)
        for_gpt2 = prepare("nano").corpus.meta
    done = prepare("nano", "--tokenizer=bpe/")
    assert done.texts == sorted(2 * [Corpus("bpe").tokenizer.decode_bytes(pair).decode() for pair in ([72, 105], [72, 111])])
    assert done.corpus.meta["train"] == for_gpt2["train"] == {"documents": 2, "tokens": 6, "bytes": 4}
    assert "must be the only source" in refused("nano", "a.jsonl")
    (place / "nano" / "val.bin").write_bytes(b"\0\0\0")
    assert "not whole files of uint16" in refused("nano", "--tokenizer=bpe/")
    (place / "t.txt").write_text("some text " * 20)
    prepare("t.txt", "--tokenizer=char", out="chars")
    assert "no token for the end of a document" in refused("a.jsonl", "--tokenizer=chars")


def test_a_running_text_is_cut_where_its_tokens_end(monkeypatch):
    text = (ROOT / "data" / "sources.py").read_text() + "東京 été \n\n\n  x  y ...\n" * 50 + "nospace" * 300
    generator = random.Random(0)
    cuts = sorted(generator.sample(range(len(text)), 40))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    whole = list(corpus._between(iter(pieces), 10, len(text) - 10))
    assert "".join(whole) == text[10:-10]
    monkeypatch.setattr(corpus, "BATCH_BYTES", 1000)
    monkeypatch.setattr(corpus, "SEAM_SOUGHT", 500)
    parts = list(corpus._between(iter(pieces), 10, len(text) - 10))
    assert "".join(parts) == text[10:-10] and len(parts) > 10
    ours = BPE.train(iter([text]), 600)
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    running = text[: text.index("nospace" * 300)]
    for tokenizer in (ours, BPE(gpt2, ours.tokens, ours.end_token)):
        parts = list(corpus._between(iter([running]), 0, len(running)))
        assert [token for part in tokenizer.encode_batch(parts) for token in part] == tokenizer.encode(running)


def test_separators_across_pieces():
    for separator in ("\n", "\n\n", "<|e|>", "aa"):
        text = separator.join(["", "one", "", "two\n", "<|", "aab"]) + "a"
        for size in (1, 2, 3, 5, 100):
            assert list(sources.split((text[at : at + size] for at in range(0, len(text), size)), separator)) == text.split(separator)


def test_a_full_disk_is_one_line_and_leaves_nothing(place, monkeypatch):
    write_lines(place / "a.jsonl", records() * 2000)
    (place / "t.txt").write_text("some text " * 100_000)
    os.mkdir("cves")
    for number in range(2):
        container = {"descriptions": [{"lang": "en", "value": f"Flaw {number} " * 2000}]}
        record = {"cveMetadata": {"cveId": "CVE-2026-1"}, "containers": {"cna": container}}
        (place / "cves" / f"{number}.json").write_text(json.dumps(record))
    os.mkdir("nano")
    for split in ("train", "val"):
        np.zeros(100_000, np.uint16).tofile(f"nano/{split}.bin")
    (place / "nano" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1, "itos": {0: "a"}}))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((place / "a.jsonl").read_bytes())))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for by, *args in (
        ("jsonl", "a.jsonl"),
        ("jsonl", "-"),
        ("text", "t.txt"),
        ("text", "nano"),
        ("cve", "cves"),
        ("openwebtext", "a.jsonl", "--tokenizer=bpe"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large: 'full'"):
                prepare(*args, by=by, out="full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not os.path.exists("full")
    command = f"ulimit -f 20; cat a.jsonl | {sys.executable} {ROOT}/data/text/prepare.py - --out_dir=full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    line = "prepare.py: error: [Errno 27] File too large: 'full', which `ulimit -f` allows no more of: raise that, or write less\n"
    assert (done.returncode, done.stderr) == (1, line) and not os.path.exists("full")


def test_as_a_script(place):
    write_lines(place / "a.jsonl", records())
    command = f"{sys.executable} {ROOT}/data/jsonl/prepare.py <(gzip -c a.jsonl) --out_dir=c --vocab_size=300 --val_fraction=0.3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and texts("c") == CODE
    (place / "a.doc").write_text("x")
    assert "a.doc is a .doc file, which is not taken: save it as text" in fails("data/text/prepare.py", "a.doc", cwd=place)
