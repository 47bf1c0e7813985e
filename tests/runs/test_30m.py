"""runs/tau_30m.sh and runs/gpu_30m.sh, with a small model on a small text."""

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, metrics

TINY = (
    "--n_layer=1",
    "--n_embd=48",
    "--block_size=32",
    "--batch_size=2",
    "--grad_accum_steps=1",
    "--compile=False",
    "--device=cpu",
    "--eval_interval=2",
    "--eval_iters=1",
    "--log_interval=1",
)

TIMEOUT = f"""#!{sys.executable}
import pathlib, subprocess, sys, time
process = subprocess.Popen(sys.argv[6:])  # after -s TERM -k 30 SECONDS
log = pathlib.Path("out/gpu_30m/tau_30m/metrics.jsonl")
while not (log.exists() and '"step": 3' in log.read_text()):
    time.sleep(0.05)
process.terminate()
process.wait()
sys.exit(124)
"""  # a limit that is reached after three steps, however long they take


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A fresh checkout, with the packages that are installed here, and text.jsonl.xz and chain.parquet (F = 48) beside it."""
    copy = tmp_path_factory.mktemp("30m") / "a copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "out", "data", "results", "__pycache__"))
    shutil.copytree(
        ROOT / "data", copy / "data", ignore=lambda _, names: [name for name in names if "." in name and not name.endswith(".py")]
    )
    shutil.copytree(ROOT / "results" / "published_30m", copy / "results" / "published_30m")
    (copy / ".venv").symlink_to(sys.prefix)
    words = np.random.default_rng(0).choice([f"word{number}" for number in range(200)], (300, 20))
    (copy / "text.jsonl.xz").write_bytes(lzma.compress("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in words).encode()))
    script(copy, "build_laplacian.py", "--graph=chain", "--dim=48", "--out=chain.parquet")
    return copy


def script(copy, *args, returncode=0, **settings):
    """A Python or shell script of the checkout, as a user runs it: what it wrote, errors too."""
    command = ["bash" if args[0].endswith(".sh") else sys.executable, *args]
    done = subprocess.run(
        command,
        cwd=copy,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
    )
    assert done.returncode == returncode, done.stdout
    return done.stdout


def test_tau_30m_goes_on_and_does_nothing_twice(copy):
    run = lambda *options, **more: script(copy, "runs/tau_30m.sh", "text.jsonl.xz", *TINY, *options, LAPLACIAN="chain.parquet", **more)
    out = run("--max_steps=2")
    assert out.count("\n(") >= 3 and "published" in out  # each step's seconds
    assert (copy / "out/tau_30m/figure.png").stat().st_size > 10_000 and "CVE-2026-" in (copy / "out/tau_30m/samples.txt").read_text()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and path.parts[-2] in ("cve", "tau_30m")}
    again = run("--max_steps=2")
    assert "data/cve/meta.json: there already" in again and "nothing to do" in again and "sample.py" not in again
    assert before == {path: path.stat().st_mtime_ns for path in before}

    (copy / "data/cve/meta.json").unlink()  # as if it had been killed while it prepared the corpus
    assert "prepare.py" in run("--max_steps=4") and metrics(copy / "out/tau_30m")[-1]["step"] == 4
    (copy / "other.jsonl").write_text('{"text": "a word"}\n{"text": "another word"}\n')
    taken = script(copy, "runs/tau_30m.sh", "other.jsonl", returncode=2)
    assert "data/cve/meta.json was made otherwise" in taken
    for args, settings, expected in (
        (["absent"], {}, "absent does not exist"),
        (["other.jsonl", "--out_dir=x"], {}, "--out_dir"),
        (["other.jsonl"], {"MODELS": "tau_31m"}, "tau_31m"),
        (["other.jsonl"], {"GPUS": "0"}, "GPUS=0"),
        (["other.jsonl"], {"LAPLACIAN": "no"}, "LAPLACIAN=no"),
    ):
        assert expected in script(copy, "runs/tau_30m.sh", *args, returncode=2, **settings).splitlines()[-1]


@pytest.mark.parametrize("number, send, expected", [(signal.SIGINT, os.killpg, 130), (signal.SIGTERM, os.kill, 143)])
def test_a_signal_ends_the_script_too(number, send, expected, copy):
    """train.py saves and ends with 0; the steps after it are not made of half a run. Ctrl-C goes to all processes, SIGTERM to one."""
    shutil.rmtree(copy / "out/dot_30m", ignore_errors=True)
    process = subprocess.Popen(
        ["bash", "runs/tau_30m.sh", "text.jsonl.xz", *TINY, "--max_steps=100000"],
        cwd=copy,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LAPLACIAN": "chain.parquet", "MODELS": "dot_30m"},
    )
    log = copy / "out/dot_30m/metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        time.sleep(0.05)
    send(process.pid, number)
    assert process.wait(120) == expected
    assert not (copy / "out/dot_30m/figure.png").exists()
    assert int(max(path.stem for path in (copy / "out/dot_30m").glob("step_*"))[5:]) == metrics(copy / "out/dot_30m")[-1]["step"]


def test_tau_30m_embeds_where_no_laplacian_is_given(copy):
    out = script(copy, "runs/tau_30m.sh", "text.jsonl.xz", *TINY, "--n_embd=384", "--max_steps=1", DATA="data/lsa", returncode=2)
    assert "latent semantic analysis" in out and "--dim=384 needs more" in out.splitlines()[-1]  # 200 words have no 384 features


def test_gpu_30m_in_pieces(copy):
    """What stops at its limit goes on, part by part, and the table is of all that there is."""
    shutil.copy(copy / "chain.parquet", copy / "data/cve/laplacian.parquet")
    run = lambda *options, **settings: script(copy, "runs/gpu_30m.sh", *TINY, *options, **settings)
    (copy / "bin").mkdir()
    (copy / "bin/timeout").write_text(TIMEOUT)
    (copy / "bin/timeout").chmod(0o755)
    out = run("--eval_interval=1000000", PARTS="a", PATH=f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert "stopped and saved" in out
    stopped = metrics(copy / "results/my_30m/tau_30m")[-1]["step"]
    assert 0 < stopped < 5000
    out = run(f"--max_steps={stopped + 4}", "--eval_interval=1000000", PARTS="a c")
    assert metrics(copy / "results/my_30m/tau_30m")[-1]["step"] == stopped + 4 and f"tau_30m {stopped + 4:>6} " in out
    assert "validation loss" in (copy / "results/my_30m/tau_30m/held_out.txt").read_text()
    out = run("--max_steps=2", PARTS="b c")
    assert [line.split()[:2] for line in out.splitlines()[-4:]] == [
        ["tau_30m", str(stopped + 4)],
        ["dot_30m", "2"],
        ["tau_30m_best", "2"],
        ["dot_30m_best", "2"],
    ]
    assert all(
        (copy / "results/my_30m" / model / "samples.txt").exists() for model in ("tau_30m", "dot_30m", "tau_30m_best", "dot_30m_best")
    )
    out = run("--max_steps=3", MODELS="dot_30m", PARTS="a b")
    assert out.count(" s left") == 1 and out.splitlines()[-1].split()[:2] == ["dot_30m", "3"]
    assert 'PARTS="d"' in run(PARTS="d", returncode=2)
    for model in ("none", "quickstart"):
        assert f'MODELS="{model}" must be of tau_30m, dot_30m' in run(MODELS=model, returncode=2)
    assert "data/none/train.bin does not exist" in run(DATA="data/none", returncode=2)


def test_gpu_bench_refuses_what_it_cannot_do(copy, tmp_path):
    """And hands on the status of what it runs: here there is no GPU, or a package is missing."""
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 2\n")
    (tmp_path / "python3").chmod(0o755)
    for variables, code, line in (
        ({"LIMIT": "1m"}, 2, "LIMIT=1m must be seconds"),
        ({"PARTS": "steps all"}, 2, 'PARTS="steps all" must be of'),
        ({"PARTS": "tests", "LIMIT": "10"}, 0, ""),
        ({"PARTS": "steps"}, 1, "steps: exit code 2"),
    ):
        done = subprocess.run(
            ["bash", copy / "runs" / "gpu_bench.sh"],
            env=os.environ | {"PYTHON": str(tmp_path / "python3")} | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and line in done.stderr, (variables, done)
