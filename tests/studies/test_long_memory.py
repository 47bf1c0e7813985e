"""The synthetic tasks: each answer stands in the text before it, and the script leaves a line a run."""

import json

import numpy as np
import pytest
from conftest import ROOT, fails, ok

from studies.long_memory import BLANK, LENGTHS, LETTERS, MARK, TASKS, attention_of


@pytest.mark.parametrize("T", [16, 17, 100, LENGTHS[-1]])
def test_answers_follow_from_what_came_before(T):
    draw = np.random.default_rng(0)
    for name, task in TASKS.items():
        rows, places = task(draw, 20, T)
        assert rows.shape == (20, T) and rows.min() >= 0 and rows.max() <= MARK
        for row in rows.tolist():
            if name == "copy":
                assert row[places[0] - 1] == MARK and [x for x in row[: places[0] - 1] if x != BLANK] == [row[t] for t in places]
            for t in places if name == "recall" else ():
                assert [row[s + 1] for s in range(0, places[0] - 2, 2) if row[s] == row[t - 1]] == [row[t]]
            for t in places if name in ("needle", "induction") else ():
                assert [row[s + 1] for s in range(t - 1) if row[s] == row[t - 1]] == [row[t]] and row[t] < LETTERS


def test_lines_table_and_figure(tmp_path):
    configs = [ROOT / "configs" / f"shakespeare_char_{name}.toml" for name in ("tau", "dot")]
    options = ["--steps=3", "--batch_size=2", "--tasks=needle", "--results=r.jsonl"]
    first = ok("studies/long_memory.py", *configs, "--seeds=1", "--figure=f.png", *options, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(line["task"], line["form"]) for line in lines] == [("needle", f"shakespeare_char_{name}") for name in ("tau", "dot")]
    assert all(0 <= share <= 1 for line in lines for share in line["accuracy"].values()) and first.count("seed 1:") == 2
    assert (tmp_path / "f.png").stat().st_size > 5000
    again = ok("studies/long_memory.py", configs[1], *options, "--seeds", "1", "2", cwd=tmp_path)
    assert "seed 1:" not in again and "seed 2:" in again
    assert ok("studies/long_memory.py", "--results=r.jsonl", cwd=tmp_path).count("\n| ") == 3
    whole = (tmp_path / "r.jsonl").read_text()
    (tmp_path / "r.jsonl").write_text(whole[:-5])  # the writer was killed
    assert "seed 2:" in ok("studies/long_memory.py", configs[1], *options, "--seeds", "1", "2", cwd=tmp_path)
    assert (tmp_path / "r.jsonl").read_text() == whole
    assert "'steps': 3" in fails("studies/long_memory.py", configs[1], *options, "--steps=4", cwd=tmp_path)
    (tmp_path / "shakespeare_char_dot.toml").write_text(configs[1].read_text() + 'forget = "slope"\n')
    assert "'forget': 'slope'" in fails("studies/long_memory.py", "shakespeare_char_dot.toml", *options, cwd=tmp_path)
    assert "same name" in fails("studies/long_memory.py", configs[0], configs[0], *options, cwd=tmp_path)
    (tmp_path / "r.jsonl").write_text(whole.replace('"512"', '"500"'))
    assert "lacks a length" in fails("studies/long_memory.py", "--results=r.jsonl", cwd=tmp_path)
    (tmp_path / "bad.toml").write_text("n_head = [")
    assert "bad.toml" in fails("studies/long_memory.py", "bad.toml", cwd=tmp_path)
    (tmp_path / "bad.toml").write_text("n_head = 5")
    assert "n_head=5" in fails("studies/long_memory.py", configs[0], "bad.toml", "--results=none.jsonl", cwd=tmp_path)
    assert not (tmp_path / "none.jsonl").exists()
    assert "no results" in fails("studies/long_memory.py", cwd=tmp_path)
    assert "absent" in fails("studies/long_memory.py", configs[0], "--results=absent/r.jsonl", cwd=tmp_path)


def test_a_configs_attention_is_taken_whole():
    config = attention_of(ROOT / "configs" / "shakespeare_char_best.toml")
    assert (config.n_embd, config.n_head, config.local_heads, config.forget, config.tau_rope) == (64, 4, 2, "gate", False)
