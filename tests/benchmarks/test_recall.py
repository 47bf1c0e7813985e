"""bench.py matches."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ok

from benchmarks import report
from benchmarks.recall import COLUMNS, bench_matches, follows
from common import UserError


def test_which_keys_follow_the_same_tokens():
    one, two = follows(torch.tensor([[5, 7, 5, 7, 7]]))
    assert one[0].nonzero().tolist() == [[2, 1], [3, 2], [4, 2], [4, 4]]
    assert two[0].nonzero().tolist() == [[3, 2]]


def test_matches(here, tmp_path, monkeypatch):
    """Of a model as it begins, whose recall heads are cold: the heaviest key follows the same token, and where there is none the sink has
    all weight."""
    monkeypatch.setattr(report, "place", lambda name: tmp_path / name)
    options = "--recall_heads=2", "--learn_temperature=True", "--max_steps=0"
    ok("train.py", "small.toml", *options, "--out_dir=recall", cwd=here)
    ok("train.py", "small.toml", "--max_steps=0", "--out_dir=without", cwd=here)
    args = SimpleNamespace(what="matches", runs=[here / "recall"], data_dir=here / "docs", device="cpu")
    bench_matches(args)
    rows = json.loads((tmp_path / "matches.json").read_text())["rows"]
    layers = len({row["layer"] for row in rows})
    assert len(rows) == 2 * layers and all(0 <= row[name] <= 1 for row in rows for name in COLUMNS)
    cold = [row for row in rows if row["head"] == 0]
    assert all(row["temperature"] == pytest.approx(1e-4) and row[COLUMNS[0]] > 0.9 and row[COLUMNS[3]] > 0.5 for row in cold), rows
    args.runs = [here / "without"]
    with pytest.raises(UserError, match="has no recall heads"):
        bench_matches(args)
