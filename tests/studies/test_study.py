"""What a finished run's line says, and the table and the list that are made of such lines."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import fails, ok

from common import UserError
from data.laplacian import laplacian_of, load_laplacian, save_laplacian
from studies.study import read_results, run_list, table
from training.config import Settings
from training.log import digest_of

WANDB = """
import json
from types import SimpleNamespace as Names

errors = Names(Error=RuntimeError)


def init(**given):
    json.dump(given["config"], open("wandb.json", "w"))
    return Names(id="a", log=lambda record, step: None, finish=lambda: None)
"""
TINY = ["--batch_size=2", "--grad_accum_steps=1", "--max_steps=1", "--eval_iters=1", "--diag_interval=0", "--results=r.jsonl"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_fine_tuned_runs_line_and_wandb_say_what_the_model_is(here, work):
    """Its sizes, which the config does not have, and its own Laplacian, not the one that the corpus has."""
    (here / "stub").mkdir()
    (here / "stub/wandb.py").write_text(WANDB)
    (here / "fine.toml").write_text('data_dir = "docs"\nwandb_log = true\n')
    ok("train.py", "fine.toml", f"--init_from={work}/out/small", "--out_dir=t", *TINY, cwd=here, env={"PYTHONPATH": str(here / "stub")})
    (line,) = lines_of(here / "r.jsonl")
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 32}
    assert {name: line["settings"].get(name) for name in sizes} == sizes and "laplacian" not in line["settings"]
    assert line["laplacian"] == digest_of(torch.from_numpy(load_laplacian(here / "docs/laplacian.parquet")))
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", line["date"]) and line["origin"] != "scratch"
    sent = json.loads((here / "wandb.json").read_text())
    assert {name: value for name, value in sent.items() if value != getattr(Settings, name)} == line["settings"]


def test_the_hash_tells_contents_apart(here):
    """Of a Laplacian and of a corpus that stand at the same path: other edges, another vocabulary of the same text."""
    (here / "a.jsonl").write_text("".join(json.dumps({"text": f"the {i} th of {i * i} words " * 5}) + "\n" for i in range(60)))
    for number, (graph, tokenizer) in enumerate((("chain", "bpe"), ("complete", "bpe"), ("complete", "char"))):
        save_laplacian(here / "l.parquet", laplacian_of(np.ones((8, 8)) if graph == "complete" else np.eye(8, k=1) + np.eye(8, k=-1)), {})
        if graph == "chain" or tokenizer == "char":
            size = [] if tokenizer == "char" else ["--vocab_size=270"]
            ok("data/jsonl/prepare.py", "a.jsonl", "--out_dir=c", f"--tokenizer={tokenizer}", *size, "--overwrite", cwd=here)
        options = ["--data_dir=c", "--laplacian=l.parquet", "--block_size=8", f"--seed={number}", f"--out_dir=o{number}"]
        ok("train.py", "small.toml", *options, *TINY, cwd=here)
    lines = lines_of(here / "r.jsonl")
    assert len({line["config"] for line in lines}) == 3 and len({line["laplacian"] for line in lines}) == 2
    rows = ok("studies/study.py", "r.jsonl", cwd=here).splitlines()
    assert rows[0].startswith("| graph | config | seeds |") and len({row.split("| 1 |")[0] for row in rows[2:]}) == 3


def record(run="a", config="c", seed=1, loss=1.0, **more):
    return {"run": run, "config": config, "seed": seed, "best_loss": loss, "seconds": 1, "steps": 2000, "parameters": 1_500_000} | more


def test_seeds_are_counted_once(capsys):
    records = [record(f"out/{run}", seed=seed, loss=loss, settings={}) for run, seed, loss in (("a", 1, 9.0), ("b", 2, 3.0), ("c", 1, 1.0))]
    assert table(records).splitlines()[2] == "| 2 | 2.0000 | 2.0000 | 1 |"
    warned = capsys.readouterr().err
    assert warned == "study.py: runs with one seed in one row, of which only the last counts: out/a and out/c\n"
    assert table(records[1:]).splitlines()[2] == "| 2 | 2.0000 | 2.0000 | 1 |" and not capsys.readouterr().err


def test_a_run_that_was_repeated_counts_from_its_last_line(tmp_path):
    lines = [record("a", loss=5.0, settings={}), record("b", loss=4.0, settings={}), record("a", loss=3.0, settings={})]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(line["run"], line["best_loss"]) for line in read_results([tmp_path / "r.jsonl"])] == [("b", 4.0), ("a", 3.0)]
    (tmp_path / "r.jsonl").write_text(json.dumps(lines[0]) + '\n{"run": "b"}\n')
    with pytest.raises(UserError, match="r.jsonl, line 2 has no 'config'"):
        read_results([tmp_path / "r.jsonl"])


@pytest.mark.parametrize(
    "one, other, columns",
    [
        (dict(laplacian="l1"), dict(laplacian="l2"), "graph"),
        (dict(origin="scratch"), dict(origin="o2"), "began as"),
        (dict(data="d1"), dict(data="d2"), "text"),
        (dict(origin="o1", laplacian="l1"), dict(origin="o2", laplacian="l2"), "graph | began as"),
        ({}, {}, "config"),  # older lines, which do not say in what they differ
        (dict(origin="scratch", settings={"seed": 1}), dict(origin="o2", settings={"learning_rate": 1e-3}), "learning_rate | began as"),
        (dict(data="d1", laplacian="l1"), dict(data="d2", laplacian="l2", settings={"data_dir": "d"}), "data_dir"),
        (dict(laplacian="l1"), dict(laplacian=None, settings={"attention": "dot"}), "attention"),
    ],
)
def test_rows_are_told_apart_by_what_was_read(one, other, columns):
    lines = table([{"settings": {}} | record(config=name, **more) for name, more in (("c1", one), ("c2", other))]).splitlines()
    assert lines[0].startswith(f"| {columns} | seeds |") and lines[2].split("| 1 |")[0] != lines[3].split("| 1 |")[0]


@pytest.mark.parametrize("half", ['{"run": "b", "con', '{"run": "b", "con\n'])
def test_a_half_written_last_line_hides_no_other(tmp_path, capsys, half):
    whole = json.dumps(record() | {"settings": {}, "seconds": 1.0}) + "\n"
    (tmp_path / "r.jsonl").write_text(whole + half)
    assert [line["run"] for line in read_results([tmp_path / "r.jsonl"])] == ["a"]
    assert "r.jsonl, line 2 is half written: passed over" in capsys.readouterr().err
    (tmp_path / "r.jsonl").write_text(half.strip() + "\n" + whole)
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_results([tmp_path / "r.jsonl"])


def test_list(here):
    """The newest first, whatever the order of the lines; those without a date, which are older, last."""
    dated = [record(f"out/{day}", settings={}, date=f"2026-01-{day}T10:00:00+00:00") for day in (10, 30, 20)]
    plain = record("out/old", settings={"n_layer": 4, "n_embd": 128, "attention": "dot", "data_dir": "data/mine"})
    lines = run_list([plain, *dated], 20).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "out/30", "out/20", "out/10", "out/old"]
    assert lines[1].split()[1:3] == ["2026-01-30", "10:00:00"]
    assert re.split("  +", lines[4]) == ["out/old", "-", "dot 4 x 128, 1.50 M", "data/mine", "2,000", "1.0000"]
    many = [record(f"out/{number}", settings={}) for number in range(25)]
    (here / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in many))
    lines = ok("studies/study.py", "r.jsonl", "--list", cwd=here).splitlines()
    assert len(lines) == 22 and lines[1].startswith("out/24 ") and lines[-1] == "the newest 20 of 25 runs; --all lists them all"
    assert len(ok("studies/study.py", "r.jsonl", "--list", "--all", cwd=here).splitlines()) == 26
    for options, expected in ((["--all"], "--all is for --list"), (["--rows", "--list"], "leave one out")):
        assert expected in fails("studies/study.py", "r.jsonl", *options, cwd=here)
