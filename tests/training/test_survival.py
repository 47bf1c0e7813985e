"""Kills, signals, damaged checkpoints, full disks, and several processes."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, fails, metrics, ok, run_script, untimed
from test_train import last, same
from torture import lines, torture

from training import checkpoint


def test_killed_at_random_times(here):
    assert torture(here, kills=3) >= 1


def start(here, *options, wait=4):
    """A run in here/s that has written `wait` lines of metrics."""
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            "small.toml",
            "--out_dir=s",
            "--max_steps=100000",
            "--checkpoint_interval=100000",
            "--eval_interval=100000",
            *options,
        ],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while lines(here / "s") < wait:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(here, number):
    process = start(here)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    step = checkpoint.read(checkpoint.steps(here / "s")[0])[1]["run"]["step"]
    assert process.returncode == 0 and f"stopped and saved at step {step}: --init_from=resume goes on" in out
    assert out.endswith("python train.py s/config.toml --init_from=resume\n")
    assert step > 1 and step - metrics(here / "s")[-1]["step"] < 2  # log_interval


def test_another_signal_ends_at_once(here):
    process = start(here, "--eval_iters=100000", "--eval_interval=1")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (-signal.SIGINT, 0)  # 0: the step was over


def test_two_runs_in_one_folder_are_kept_apart(here):
    process = start(here)
    assert "another process trains in s" in fails(
        "train.py", "small.toml", "--out_dir=s", "--init_from=resume", "--max_steps=100000", cwd=here
    )
    process.kill()
    process.communicate()


def test_signal_to_save(here):
    process = start(here)
    process.send_signal(signal.SIGUSR1)
    while len(checkpoint.steps(here / "s")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    before = lines(here / "s")
    while lines(here / "s") < before + 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()


def test_interrupted_run_equals_an_unbroken_one(here, work):
    process = start(here, "--max_steps=20", "--checkpoint_interval=10", "--eval_interval=5", wait=3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    ok("train.py", "s/config.toml", "--init_from=resume", cwd=here)
    assert untimed(metrics(here / "s")) == untimed(metrics(work / "out" / "small"))
    before = (here / "s" / "metrics.jsonl").read_bytes()
    assert "nothing to do" in ok("train.py", "small.toml", "--out_dir=s", "--init_from=resume", cwd=here)
    assert "nothing to do" in ok("train.py", "small.toml", "--out_dir=s", "--init_from=auto", cwd=here)
    assert (here / "s" / "metrics.jsonl").read_bytes() == before


def test_only_the_last_checkpoints_are_kept(here, work):
    assert [path.name for path in checkpoint.steps(work / "out" / "small")] == ["step_00000020.safetensors", "step_00000010.safetensors"]
    ok("train.py", "small.toml", "--checkpoint_interval=4", "--keep_last=3", "--out_dir=k", cwd=here)
    assert [int(path.stem[5:]) for path in checkpoint.steps(here / "k")] == [20, 16, 12]


def damage(content):
    """A checkpoint cut at 20 lengths, and with a byte changed at 20 places, header and hash among them."""
    generator = random.Random(0)
    for _ in range(20):
        yield content[: generator.randrange(len(content))]
    places = [0, 8, content.index(b'"sha256":"') + 12, content.index(b'"config"') + 3, len(content) - 1]
    for at in [*places, *(generator.randrange(len(content)) for _ in range(15))]:
        yield content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]


def test_damaged_checkpoints_are_refused(tmp_path, work):
    good, older = checkpoint.steps(work / "out" / "small")
    for name in (good.name, older.name):
        shutil.copy(work / "out" / "small" / name, tmp_path)
    for content in damage(good.read_bytes()):
        (tmp_path / good.name).write_bytes(content)
        with pytest.raises(checkpoint.UserError, match="damaged"):
            checkpoint.read(tmp_path / good.name)
        assert checkpoint.to_resume(tmp_path)[0] == tmp_path / older.name


def test_a_checkpoint_of_another_model_is_refused(work):
    tensors, header = checkpoint.read(work / "out" / "small" / "best.safetensors")
    for wrong in (torch.bfloat16, torch.float32, torch.int64, torch.complex64):
        with pytest.raises(checkpoint.UserError, match="not of torch.float64"):
            checkpoint.build_model(tensors | {"laplacian": tensors["laplacian"].to(wrong)}, header, "f")
    del tensors["model.head.weight"]
    with pytest.raises(checkpoint.UserError, match="it lacks head.weight .one of 1.: perhaps an earlier version of the code wrote it"):
        checkpoint.build_model(tensors, header, "f")


def test_the_one_before_a_damaged_checkpoint_is_resumed(here, work):
    shutil.copytree(work / "out" / "small", here / "d")
    newest = checkpoint.steps(here / "d")[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    done = run_script("train.py", "small.toml", "--out_dir=d", "--init_from=resume", cwd=here)
    assert done.returncode == 0 and len(done.stderr.splitlines()) <= 2  # and what auto attention says
    assert "step_00000020.safetensors is damaged" in done.stderr and "the one before it is taken" in done.stderr
    assert untimed(metrics(here / "d")) == untimed(metrics(work / "out" / "small"))
    assert same(last(here / "d"), last(work / "out" / "small"))
    for path in checkpoint.steps(here / "d"):
        path.write_bytes(b"")
    assert "nothing to resume" in fails("train.py", "small.toml", "--out_dir=d", "--init_from=resume", cwd=here)


def limited(what, bytes):
    return lambda: resource.setrlimit(what, (bytes, bytes))


def test_disk_full(here, work):
    """A limit on the size of files between that of the first checkpoint and the next: the first is whole, nothing else is."""
    small = (work / "out" / "small" / "best.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "small.toml", "--out_dir=f"],
        cwd=here,
        capture_output=True,
        text=True,
        preexec_fn=limited(resource.RLIMIT_FSIZE, small + 20000),
    )
    assert done.returncode == 1 and "step_00000010.safetensors could not be written" in done.stderr.splitlines()[-1]
    assert not [line for line in done.stderr.splitlines() if line.startswith("Traceback")]
    assert checkpoint.to_resume(here / "f")[2]["run"]["step"] == 0
    assert not list((here / "f").glob(".*"))


def test_out_of_memory(here):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "small.toml", "--out_dir=m", "--batch_size=200000"],
        cwd=here,
        capture_output=True,
        text=True,
        preexec_fn=limited(resource.RLIMIT_AS, 6 << 30),
    )
    assert done.returncode == 1 and "lower batch_size = 200000" in done.stderr.splitlines()[-1]
    assert not [line for line in done.stderr.splitlines() if line.startswith("Traceback")]


def test_resume_with_another_batch_and_a_mean_of_the_weights(here):
    ok("train.py", "small.toml", "--max_steps=10", "--out_dir=r", cwd=here)
    ok("train.py", "small.toml", "--out_dir=r", "--init_from=resume", "--batch_size=8", "--ema_decay=0.9", cwd=here)
    assert [record["tokens"] for record in metrics(here / "r") if record["step"] in (10, 20)][-1] == (10 * 4 + 10 * 8) * 2 * 32
    assert any(name.startswith("ema.") for name in last(here / "r"))


def test_losses_that_are_not_finite(here):
    """The weights overflow within a few steps, the later ones are left out; what is logged stays JSON."""
    done = run_script(
        "train.py",
        "small.toml",
        "--learning_rate=1e9",
        "--weight_decay=1e9",
        "--warmup_steps=0",
        "--skip_limit=100",
        "--log_interval=1",
        "--eval_interval=100",
        "--max_steps=5",
        "--out_dir=n",
        cwd=here,
    )
    assert done.returncode == 1 and "validation loss at step 5 is not finite" in done.stderr.splitlines()[-1]
    assert metrics(here / "n")[-1]["loss"] is None and metrics(here / "n")[-1]["skipped"] > 0
    assert "NaN" not in (here / "n" / "metrics.jsonl").read_text()


def test_bad_steps(here):
    """A spike is a loss above the running mean by the smallest margin: most steps at first are none, some are."""
    options = ["--log_interval=1", "--learning_rate=0.5", "--warmup_steps=0", "--spike=0.05"]
    ok("train.py", "small.toml", *options, "--skip_limit=1000", "--out_dir=b", cwd=here)
    train = [record for record in metrics(here / "b") if record["split"] == "train"]
    average, skipped = train[0]["loss"], 0
    for record in train:
        if record["loss"] > average + 0.05:
            skipped += 1
        else:
            average = 0.98 * average + 0.02 * record["loss"]
        assert record["skipped"] == skipped
    assert 0 < skipped < 20
    done = run_script("train.py", "small.toml", *options, "--out_dir=c", cwd=here)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "is bad: loss" in line and "step_00000000.safetensors is the last good checkpoint" in line
    first = next(record["step"] for record in train if record["skipped"])
    assert f"step {first} is bad" in line


def torchrun(here, *options, processes=2, script=ROOT / "train.py"):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local_addr=127.0.0.1",
        f"--nproc_per_node={processes}",
        *options,
        script,
        "small.toml",
    ]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # matrix products round as their threads divide them


def nearly(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_two_processes_equal_one(here, work, shard):
    """And one process resumes what two began."""
    ok("train.py", "small.toml", "--ema_decay=0.5", "--out_dir=one", cwd=here, env=ONE_THREAD)
    command = [*torchrun(here), f"--out_dir={shard}", f"--shard={shard}", "--ema_decay=0.5"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300, env={**os.environ, **ONE_THREAD})
    assert done.returncode == 0, done.stderr
    nearly(metrics(here / shard), metrics(here / "one"))
    checkpoint.steps(here / shard)[0].unlink()
    ok("train.py", "small.toml", "--ema_decay=0.5", f"--out_dir={shard}", "--init_from=resume", cwd=here, env=ONE_THREAD)
    nearly(metrics(here / shard), metrics(here / "one"))


def test_a_killed_rank_brings_the_run_back(here):
    options = ["--max_steps=60", "--checkpoint_interval=5", "--log_interval=1"]
    done = subprocess.run(
        [*torchrun(here), "--out_dir=unbroken", *options],
        cwd=here,
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [*torchrun(here, "--max-restarts=1"), "--out_dir=e", *options],
        cwd=here,
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not checkpoint.steps(here / "e") or checkpoint.steps(here / "e")[0].name < "step_00000010":
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    err = process.communicate(timeout=240)[1]
    assert process.returncode == 0, err
    assert untimed(metrics(here / "e")) == untimed(metrics(here / "unbroken"))
    assert same(last(here / "e"), last(here / "unbroken"))


def test_resume_goes_on_with_the_checkpoints_settings(here):
    """Not with the config's, where the first call had others; what differs is named, and another text is refused."""
    first = ["--learning_rate=7e-4", "--batch_size=2", "--seed=7"]
    ok("train.py", "small.toml", *first, "--out_dir=whole", cwd=here)
    ok("train.py", "small.toml", *first, "--max_steps=10", "--out_dir=cut", "--results=r.jsonl", cwd=here)
    out = ok("train.py", "small.toml", "--init_from=resume", "--out_dir=cut", "--results=r.jsonl", cwd=here)
    assert "max_steps = 20 from here on, 10 before" in out and "learning_rate" not in out
    assert untimed(metrics(here / "cut")) == untimed(metrics(here / "whole"))
    line = json.loads((here / "r.jsonl").read_text().splitlines()[-1])
    assert line["seed"] == 7 and line["settings"]["learning_rate"] == 7e-4 and line["settings"]["batch_size"] == 2

    out = ok("train.py", "small.toml", "--init_from=resume", "--out_dir=cut", "--max_steps=21", "--learning_rate=1e-3", cwd=here)
    assert "learning_rate = 0.001 from here on, 0.0007 before" in out
    (here / "changed.toml").write_text(
        (here / "small.toml").read_text().replace("weight_decay", "#").replace("eval_interval = 5", "eval_interval = 3")
    )
    out = ok("train.py", "changed.toml", "--init_from=resume", "--out_dir=cut", "--max_steps=22", cwd=here)
    assert "eval_interval = 5 as before: changed.toml says 3 now (--eval_interval=3 changes it)" in out

    shutil.copytree(here / "docs", here / "other")
    meta = json.loads((here / "other/meta.json").read_text())
    (here / "other/meta.json").write_text(json.dumps(meta | {"sha256": "0" * 64}))
    refused = fails("train.py", "small.toml", "--init_from=resume", "--out_dir=cut", "--data_dir=other", cwd=here)
    assert "other is not the text that the run in cut is trained on" in refused and "--init_from=cut" in refused
    evaluate = ["train.py", "small.toml", "--init_from=resume", "--out_dir=cut", "--eval_only=True"]  # may be on another text
    assert ok(*evaluate, "--data_dir=other", cwd=here) == ok(*evaluate, cwd=here)


def test_a_fine_tuned_run_says_what_it_is(here, work):
    ok("train.py", "small.toml", "--max_steps=2", "--out_dir=a", "--results=r.jsonl", cwd=here)
    (here / "fine.toml").write_text('data_dir = "docs"\nbatch_size = 4\nmax_steps = 2\neval_iters = 1\ngrad_accum_steps = 2\n')
    ok("train.py", "fine.toml", f"--init_from={work / 'out/small'}", "--out_dir=b", "--results=r.jsonl", cwd=here)
    scratch, tuned = map(json.loads, (here / "r.jsonl").read_text().splitlines())
    assert tuned["settings"]["n_layer"] == 2 and tuned["settings"]["n_embd"] == 32 and tuned["origin"] != scratch["origin"] == "scratch"
    assert tuned["config"] != scratch["config"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_every_ordinary_end_saves(here, number):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "small.toml", "--out_dir=s", "--max_steps=100000", "--log_interval=1"],
        cwd=here,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (here / "s/metrics.jsonl").exists() or len((here / "s/metrics.jsonl").read_text().splitlines()) < 4:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 0
    assert checkpoint.read(checkpoint.steps(here / "s")[0])[1]["run"]["step"] == metrics(here / "s")[-1]["step"] > 0


def test_output_that_nobody_reads_does_not_stop_training(here):
    done = subprocess.run(
        f'"{sys.executable}" "{ROOT}/train.py" small.toml --out_dir=s 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}',
        cwd=here,
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and not done.stderr
    assert metrics(here / "s")[-1]["step"] == 20


def test_only_the_runs_own_files_go(here):
    ok("train.py", "small.toml", "--max_steps=2", "--out_dir=s", cwd=here)
    theirs = [here / "s" / name for name in (".notes.tmp", "step_final.safetensors", "step_1.safetensors", ".best.safetensors.tmp")]
    theirs.append(here / "s/config.toml")
    for path in theirs:
        path.write_text("mine")
    (here / "s/.best.safetensors.123.tmp").write_text("unfinished")
    done = run_script("train.py", "small.toml", "--max_steps=2", "--out_dir=s", "--overwrite=True", cwd=here)
    assert sorted((here / "s/log.txt").read_text().splitlines()) == sorted((done.stdout + done.stderr).splitlines())
    assert all(path.read_text() == "mine" for path in theirs) and not (here / "s/.best.safetensors.123.tmp").exists()


def test_without_what_is_optional(here):
    """No git, no C++ compiler, WORLD_SIZE without torchrun."""
    (here / "bin").mkdir()
    env = {
        "PATH": str(here / "bin"),
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(here / "cache"),
        "TORCH_EXTENSIONS_DIR": str(here / "extensions"),
    }
    done = run_script("train.py", "small.toml", "--compile", "--max_steps=2", "--out_dir=s", "--results=r.jsonl", cwd=here, env=env)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((here / "r.jsonl").read_text())["commit"] is None
    done = run_script("train.py", "small.toml", "--out_dir=t", cwd=here, env={"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "WORLD_SIZE = 2 is set, but not RANK, MASTER_ADDR, MASTER_PORT" in done.stderr.splitlines()[-1]
    assert not (here / "t").exists()
