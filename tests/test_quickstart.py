import os
import shutil
import subprocess
import sys

from conftest import ROOT, metrics


def test_quickstart_in_a_fresh_copy_then_again(tmp_path):
    """The whole script, its training cut to 20 steps, with the packages that are installed here."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "out", "*.bin", "*.npy", "*.parquet", "*.jsonl",
                                                              "meta.json", "tokenizer.json", "laplacian.json", "*.npz", "__pycache__"))
    (copy / ".venv").symlink_to(sys.prefix)

    def quickstart():
        done = subprocess.run(["bash", "runs/quickstart.sh", "--max_steps=20", "--eval_interval=10"], cwd=copy,
                              capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = quickstart()
    for command in ("data/python_docs/prepare.py", "data/embed.py", "build_laplacian.py", "train.py", "plot.py", "sample.py"):
        assert f"$ python {command} " in out
    assert "out/quickstart/figure.png" in out.splitlines()[-1] and (copy / "out/quickstart/figure.png").stat().st_size > 10_000
    losses = [record["loss"] for record in metrics(copy / "out/quickstart") if record["split"] == "val"]
    assert losses[-1] < losses[0] - 0.5

    again = quickstart()
    assert "prepare.py" not in again and "nothing to do" in again
