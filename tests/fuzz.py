"""Change the files that the programs read at random, and see that every program ends as it should: with exit code 0, 1 or 2 in time, no
traceback, one line of an error, nothing half-written, and no file changed that was there before.

    python tests/fuzz.py 5000 --out=results/fuzz.json

A case is one of PROGRAMS with one of its files changed: some bytes, or, by the file's kind, a value, a line, a tensor or a column."""

import argparse
import collections
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ok, run_script
from safetensors.torch import save_file
from tqdm import tqdm

from common import commit, replacing
from data import checkpoint_file

SIZE = (
    "--max_steps=1 --batch_size=1 --grad_accum_steps=1 --eval_iters=1 --n_layer=1 --n_embd=16 --block_size=16 --dropout=0 --warmup_steps=0"
)
PROGRAMS = {  # name: (files to change, command)
    "config": (["tiny.toml"], f"train.py tiny.toml {SIZE} --out_dir=new"),
    "corpus": (["docs/meta.json", "docs/tokenizer.json", "docs/train.bin", "docs/val.bin"], f"train.py tiny.toml {SIZE} --out_dir=new"),
    "laplacian": (["docs/laplacian.parquet", "docs/laplacian.json"], f"train.py tiny.toml {SIZE} --out_dir=new"),
    "inspect": (["docs/laplacian.parquet"], "build_laplacian.py --inspect docs/laplacian.parquet --n_head=2"),
    "resume": (["out/step_00000002.safetensors", "out/metrics.jsonl"], "train.py tiny.toml --init_from=resume --max_steps=3 --out_dir=out"),
    "fine-tuning": (["out/best.safetensors"], f"train.py tiny.toml {SIZE} --init_from=out --out_dir=new"),
    "sample": (["out/best.safetensors"], "sample.py out --max_new_tokens=3 --prompt=a"),
    "prompts": (["prompts.txt"], "sample.py out --max_new_tokens=1 --prompts=prompts.txt"),
    "score": (["prompts.txt"], "sample.py out --score=prompts.txt"),
    "score documents": (["docs.jsonl"], "sample.py out --score=docs.jsonl --stride=8"),
    "session": (["session"], "sample.py out --max_new_tokens=1 --cache=stream --session=session"),
    "jsonl": (["docs.jsonl"], "data/jsonl/prepare.py docs.jsonl --out_dir=new --tokenizer=char"),
    "jsonl, bpe": (["docs.jsonl"], "data/jsonl/prepare.py docs.jsonl --out_dir=new --vocab_size=280 --skip_bad"),
    "gzip": (["docs.jsonl.gz"], "data/jsonl/prepare.py docs.jsonl.gz --out_dir=new --tokenizer=char"),
    "text": (["prompts.txt"], "data/shakespeare_char/prepare.py prompts.txt --out_dir=new"),
    "texts": (["texts/a.md", "texts/b.txt"], "data/text/prepare.py texts --out_dir=new --tokenizer=char"),
    "array": (["records.json"], "data/text/prepare.py records.json --out_dir=new --tokenizer=char"),
    "records": (["records.parquet"], "data/text/prepare.py records.parquet --out_dir=new --tokenizer=char"),
    "nanogpt": (["nanogpt/meta.pkl", "nanogpt/train.bin", "nanogpt/val.bin"], "data/text/prepare.py nanogpt --out_dir=new"),
    "sizes": (["docs/meta.json", "docs/val.bin"], "data/sizes.py --data_dir=docs"),
    "cve": (["cve/a.json", "cve/b.json"], "data/cve/prepare.py cve --out_dir=new --tokenizer=char"),
    "tokenizer": (["docs/tokenizer.json", "docs/meta.json"], "data/jsonl/prepare.py docs.jsonl --out_dir=new --tokenizer=docs"),
    "npy": (["docs/embeddings.npy"], "build_laplacian.py docs/embeddings.npy --out=new.parquet"),
    "parquet": (["embeddings.parquet"], "build_laplacian.py embeddings.parquet --out=new.parquet"),
    "csv": (["embeddings.csv"], "build_laplacian.py embeddings.csv --out=new.parquet"),
    "npz": (["embeddings.npz"], "build_laplacian.py embeddings.npz --out=new.parquet"),
    "safetensors": (["embeddings.safetensors"], "build_laplacian.py embeddings.safetensors --out=new.parquet"),
    "pt": (["embeddings.pt"], "build_laplacian.py embeddings.pt --out=new.parquet"),
    "lsa": (["docs/lsa.npz", "docs/laplacian.parquet"], "data/energy.py docs.jsonl --laplacian=docs/laplacian.parquet --embeddings=docs"),
    "token vectors": (["docs/token_embeddings.npy"], f"train.py tiny.toml {SIZE} --embedding_init=domain --out_dir=new"),
    "plot": (["out/metrics.jsonl", "out/diagnostics.jsonl"], "plot.py out --out=new.png"),
    "results": (["runs.jsonl"], "studies/study.py runs.jsonl"),
}
ODD = [
    "",
    "-1",
    "0",
    "1e999",
    "NaN",
    "null",
    "true",
    "[]",
    "{}",
    '"\\ud800"',
    "9" * 400,
    "1.5",
    '"x"',
    "[[[",
    "-0.0",
    "2147483648",
    "\0",
    "\ufeff",
    "'",
]
VALUES = [None, True, -1, 0, 1.5, 1e308, 10**30, "", "x", "\ud800", [], {}, [None], {"a": []}, float("nan"), "\0", "2"]


def changed(path, random):
    """The bytes of a file after a change at random."""
    data = path.read_bytes()
    try:
        if random.random() < 0.6:
            if path.suffix in (".toml", ".txt", ".md", ".csv"):
                return of_text(data.decode(), random).encode("utf-8", "surrogatepass")
            if path.suffix in (".json", ".jsonl"):
                return of_json(data, random)
            if path.suffix == ".npy":
                return of_array(np.load(io.BytesIO(data)), random)
            if path.suffix == ".parquet":
                return of_table(pyarrow.parquet.read_table(io.BytesIO(data)), random)
            if path.suffix == ".safetensors" and path.parent.name == "out" or path.name == "session":
                return of_tensors(path, random)
    except (pyarrow.ArrowException, ValueError, OverflowError):  # a change that cannot be written in this format
        pass
    return of_bytes(data, random)


def of_bytes(data, random):
    data, at = bytearray(data), random.randrange(len(data))
    length = random.choice([1, 1, 8, len(data) // 2, len(data)])
    what = random.randrange(6)
    if what == 0:
        del data[at:]
    elif what == 1:
        del data[at : at + length]
    elif what == 2:
        data[at:at] = data[at : at + length]
    elif what == 3:
        data[at : at + length] = bytes(len(data[at : at + length]))
    else:
        for place in random.choices(range(len(data)), k=random.choice([1, 10, 100])):
            data[place] = random.randrange(256)
    return bytes(data)


def of_text(text, random):
    lines = text.splitlines(keepends=True)
    at, what = random.randrange(len(lines)), random.randrange(5)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[random.randrange(len(lines))])
    elif what == 2:
        lines.insert(at, random.choice(ODD) + random.choice(["", "\n", "\r\n", " " * 10**5]))
    else:  # a word or number
        words = re.split(r"([\w.]+)", lines[at])
        words[random.randrange(len(words))] = random.choice(ODD)
        lines[at] = "".join(words)
    return "".join(lines)


def of_json(data, random):
    lines = data.splitlines(keepends=True) if data.count(b"\n{") else [data]
    at = random.randrange(len(lines))
    lines[at] = json.dumps(of_value(json.loads(lines[at]), random)).encode() + b"\n"
    return b"".join(lines)


def of_value(value, random):
    """A value of JSON with one value in it, at any depth, replaced, left out or doubled."""
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.15:
        return random.choice(VALUES)
    value = value.copy()
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, what = random.choice(keys), random.random()
    if what < 0.15:
        del value[key]
    elif what < 0.25 and isinstance(value, list):
        value.append(value[key])
    elif what < 0.25:
        value[random.choice(["x", key + " ", ""])] = value[key]
    else:
        value[key] = of_value(value[key], random)
    return value


def of_array(array, random):
    change = random.choice(
        [
            lambda: array.astype(random.choice(["float16", "float64", "int8", "bool", "complex64", "U3", ">f4"])),
            lambda: array[: random.randrange(3)],
            lambda: array[..., : random.randrange(3)],
            lambda: array.reshape(-1),
            lambda: array[None],
            lambda: array * random.choice([0, np.nan, 1e38, -1]),
            lambda: np.asfortranarray(array),
            lambda: np.where(np.arange(array.size).reshape(array.shape) == random.randrange(array.size), np.inf, array),
        ]
    )
    file = io.BytesIO()
    with np.errstate(all="ignore"):
        np.save(file, change())
    return file.getvalue()


def of_table(table, random):
    at = random.randrange(table.num_columns)
    column, name = table.column(at), table.column_names[at]
    kinds = [pyarrow.string(), pyarrow.int8(), pyarrow.float16(), pyarrow.float64(), pyarrow.bool_(), pyarrow.list_(pyarrow.float32())]
    change = random.choice(
        [
            lambda: table.remove_column(at),
            lambda: table.set_column(at, name + "x", column),
            lambda: table.append_column("more", column),
            lambda: table.slice(0, random.randrange(3)),
            lambda: pyarrow.concat_tables([table, table]),
            lambda: table.set_column(at, name, column.cast(random.choice(kinds), safe=False)),
            lambda: table.set_column(at, name, pyarrow.nulls(len(column), random.choice([column.type, pyarrow.null()]))),
            lambda: table.set_column(
                at, name, pyarrow.chunked_array([[random.choice([None, np.nan, 10**9, -1]), *column.to_pylist()[1:]]])
            ),
        ]
    )
    file = io.BytesIO()
    pyarrow.parquet.write_table(change(), file)
    return file.getvalue()


def of_tensors(path, random):
    """With a tensor or a value of the header changed, and the hash right."""
    with open(path, "rb") as file:
        names = [name for name in json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"] if name != "sha256"]
    tensors, header = checkpoint_file.load(path, names, "file")
    if random.random() < 0.5 and tensors:
        name = random.choice(list(tensors))
        tensor = tensors[name]
        change = random.choice(
            [
                lambda: tensors.pop(name),
                lambda: tensors.update({name + "x": tensors.pop(name)}),
                lambda: tensors.update({name: tensor.to(random.choice([torch.float64, torch.int64, torch.bool, torch.bfloat16]))}),
                lambda: tensors.update({name: tensor.flatten()[: random.randrange(3)].clone()}),
                lambda: tensors.update({name: tensor[None].clone()}),
                lambda: tensors.update({name: tensor * random.choice([float("nan"), -1, 0, 1e30])}),
            ]
        )
        change()
    else:
        name = random.choice(names)
        header[name] = of_value(header[name], random)
    header.pop("sha256")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_file.save(Path(folder) / "x", tensors, header)
        return (Path(folder) / "x").read_bytes()


def prepare(folder):
    """The files that the PROGRAMS read, small ones."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randrange(2, 6))) for _ in range(60)]
    sentence = lambda: " ".join(draw.choices(words, k=draw.randrange(5, 15))) + ".\n"
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": sentence()}) + "\n" for _ in range(80)))
    (folder / "prompts.txt").write_text("".join(sentence() for _ in range(12)))
    (folder / "cve").mkdir()
    for name in "ab":
        record = {
            "cveMetadata": {"cveId": f"CVE-2026-{name}", "state": "PUBLISHED"},
            "containers": {"cna": {"title": "T", "descriptions": [{"lang": "en", "value": sentence()}]}},
        }
        (folder / "cve" / f"{name}.json").write_text(json.dumps(record))
    (folder / "texts").mkdir()
    for name in ("a.md", "b.txt", "c.py"):
        (folder / "texts" / name).write_text("".join(sentence() for _ in range(5)))
    records = [{"id": number, "text": sentence()} for number in range(30)]
    (folder / "records.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "records.parquet")
    (folder / "nanogpt").mkdir()
    letters = sorted(set("abcdefgh .\n"))
    tokens = {letter: number for number, letter in enumerate(letters)}
    for split in ("train", "val"):
        np.array([tokens[letter] for _ in range(20) for letter in sentence()], np.uint16).tofile(folder / "nanogpt" / f"{split}.bin")
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": tokens}
    (folder / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "docs.jsonl.gz").write_bytes(gzip.compress((folder / "docs.jsonl").read_bytes(), mtime=0))
    ok("data/jsonl/prepare.py", "docs.jsonl", "--out_dir=docs", "--vocab_size=300", cwd=folder)
    ok("data/embed.py", "docs", "--dim=16", cwd=folder)
    ok("build_laplacian.py", "docs/embeddings.npy", "--out=docs/laplacian.parquet", cwd=folder)
    embeddings = np.load(folder / "docs/embeddings.npy")
    pyarrow.parquet.write_table(
        pyarrow.table({"id": np.arange(len(embeddings)), "embedding": list(embeddings)}), folder / "embeddings.parquet"
    )
    np.savetxt(folder / "embeddings.csv", embeddings, delimiter=",", header=",".join(f"f{n}" for n in range(16)), comments="")
    np.savez(folder / "embeddings.npz", embeddings=embeddings)
    save_file({"embeddings": torch.from_numpy(embeddings)}, folder / "embeddings.safetensors")
    torch.save({"embeddings": torch.from_numpy(embeddings)}, folder / "embeddings.pt")
    (folder / "tiny.toml").write_text(
        'data_dir = "docs"\nn_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 16\nbatch_size = 2\ngrad_accum_steps = 1\nmax_steps = 2\n'
        "learning_rate = 1e-3\nwarmup_steps = 1\neval_interval = 1\neval_iters = 1\ndiag_interval = 1\nlog_interval = 1\n"
    )
    ok("train.py", "tiny.toml", "--out_dir=out", "--results=runs.jsonl", cwd=folder)
    ok("sample.py", "out", "--max_new_tokens=2", "--prompt=a", "--cache=stream", "--session=session", cwd=folder)


def contents(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


def case(base, folder, number, seed=0):
    """Run a case in a copy of `base` inside `folder`: (program, exit code, what is wrong with how it ended, or "")."""
    folder = folder / f"case{os.getpid()}"
    draw = random.Random(f"{seed} {number}")
    program = draw.choice(list(PROGRAMS))
    files, command = PROGRAMS[program]
    file = draw.choice(files)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    (folder / file).write_bytes(changed(folder / file, draw))
    before = contents(folder)
    script, *options = command.split()
    try:
        done = run_script(script, *options, cwd=folder, limit=60)
    except TimeoutError:
        return program, None, f"{file}: it did not end"
    after = contents(folder)
    own = ("out/", "session", "runs.jsonl")  # files that the command is asked to go on with
    lost = [name for name in before if after.get(name) != before[name] and not name.startswith(own)]
    new = [name for name in after if name not in before]
    errors = done.stderr.splitlines()  # (a wrong token of train.bin, which is not read as a whole, is found in the middle of a run)
    wrong = ""
    if "Traceback" in done.stderr or done.returncode not in (0, 1, 2):
        wrong = f"exit code {done.returncode}: " + " | ".join(errors[-3:])
    elif done.returncode and (not errors or not errors[-1].startswith(Path(script).name + ": ")):
        wrong = f"exit code {done.returncode} without a line that names the program: {errors[-1:]}"
    elif done.returncode == 2 and len(errors) > 1:
        wrong = f"{len(errors)} lines of error: " + " | ".join(errors[:3])
    elif lost or [name for name in new if name.endswith(".tmp")] or done.returncode == 2 and new and file != "docs/train.bin":
        wrong = f"exit code {done.returncode}, changed: {lost}, new: {new}"
    return program, done.returncode, wrong and f"{file}: {wrong}"


def fuzz(cases, folder, seed=0, first=0, workers=1):
    """{program: {exit code: how often}} and [(number, program, what was wrong)] of so many cases, `workers` at a time."""
    (base := folder / "base").mkdir()
    prepare(base)
    counts, failures = collections.defaultdict(collections.Counter), []
    numbers = range(first, first + cases)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        ended = (pool.map if workers > 1 else map)(partial(case, base, folder, seed=seed), numbers)
        for number, (program, code, wrong) in zip(numbers, tqdm(ended, total=cases, unit=" cases", disable=None)):
            counts[program][str(code)] += 1
            if wrong:
                failures.append((number, program, wrong))
                tqdm.write(f"{number} {program}, {wrong}")
    return {name: dict(sorted(counts[name].items())) for name in PROGRAMS}, failures


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("cases", type=int)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--first", type=int, default=0, help="number of the first case")
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="cases at a time (default: %(default)s)")
    options.add_argument("--out", type=Path, help="file for the counts")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = fuzz(args.cases, Path(folder), args.seed, args.first, args.workers)
    record = {"cases": args.cases, "seed": args.seed, "commit": commit(), "exit_codes": counts, "failures": failures}
    if args.out:
        with replacing(args.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    sys.exit(f"{len(failures)} of {args.cases} cases ended wrongly" if failures else 0)


if __name__ == "__main__":
    main()
