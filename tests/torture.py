"""Kill a training run at random times, also while it writes a checkpoint, and compare what it leaves in the end with an
unbroken run: metrics, diagnostics and weights must be the same.

    python tests/torture.py 20"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, metrics, ok, prepare, untimed

from training import checkpoint


def torture(folder, kills, seed=0, options=("--tau_mode=adaptive", "--tau_interval=3", "--ema_decay=0.9")):
    """folder: docs/ and small.toml. Returns how often a checkpoint was being written at the kill."""
    generator, writing = random.Random(seed), 0
    run = [
        "train.py",
        "small.toml",
        f"--max_steps={3 * kills + 10}",
        "--checkpoint_interval=2",
        "--eval_interval=3",
        "--log_interval=1",
        "--diag_interval=4",
        "--init_from=auto",
        *options,
    ]
    ok(*run, "--out_dir=unbroken", cwd=folder)
    broken = folder / "broken"
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, ROOT / run[0], *run[1:], "--out_dir=broken"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = lines(broken) + generator.randrange(4)
        while process.poll() is None and lines(broken) < before:
            time.sleep(0.002)
        if kill % 2:
            while process.poll() is None and not list(broken.glob(".*.tmp")):
                pass
        else:
            time.sleep(generator.random() * 0.2)
        process.kill()
        process.wait()
        writing += bool(list(broken.glob(".*.tmp")))
    ok(*run, "--out_dir=broken", cwd=folder)

    assert untimed(metrics(broken)) == untimed(metrics(folder / "unbroken"))
    assert (broken / "diagnostics.jsonl").read_bytes() == (folder / "unbroken" / "diagnostics.jsonl").read_bytes()
    names = [path.name for path in checkpoint.steps(folder / "unbroken")] + ["best.safetensors"]
    assert names == [path.name for path in checkpoint.steps(broken)] + ["best.safetensors"]
    assert not list(broken.glob(".*.tmp"))
    for name in names:
        ours, theirs = (checkpoint.read(path / name)[0] for path in (broken, folder / "unbroken"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    return writing


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        print(f"{kills} kills, {torture(Path(folder), kills)} of them while a checkpoint was being written: nothing lost")
