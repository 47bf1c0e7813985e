"""Every script ends with the status of the program in it that fails, and starts nothing after that."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT

STUB = """#!/usr/bin/env bash
case "$1 $2" in
    "-c "* | "-m pip" | "-m ensurepip") exit 0 ;;
    "- "*) echo 1; exit 0 ;;  # a program on standard input
    *"/own_text.py "*) echo "paths=($2) preparing=() sized=() settings=()" ;;
    "data/sizes.py "*) for name in vocab_size val_fraction features n_layer n_embd n_head local_heads recall_heads; do echo $name=1; done
        for name in block_size batch_size max_steps warmup_steps lr_decay_steps eval_interval; do echo $name=1; done; echo graph=domain ;;
esac
echo "${0##*/} $1" >> "$CALLS"
[ "${0##*/} $1" != "$FAILS" ] || exit 7
out= folder=$(dirname -- "$1") config=${2%.toml}
[ "$1" != train.py ] || folder=out/${config##*/}
for argument; do
    case $argument in --out=*) out=${argument#*=} ;; --out_dir=*) folder=${argument#*=} ;; esac
done
case $1 in
    data/embed.py) touch "$2/embeddings.npy" ;;
    data/*) mkdir -p "$folder"; touch "$folder/meta.json" ;;
    train.py) mkdir -p "$folder"; touch "$folder/metrics.jsonl" "$folder/best.safetensors" "$folder/step_1"
        printf 'validation loss 1.0,\\n%.0s' 1 2 ;;
    *) [ -z "$out" ] || touch "$out" ;;
esac
"""  # python, torchrun, srun and ruff: notes its call, fails as FAILS says, makes the files that the scripts look at

SCRIPTS = (
    ("context.sh", ["a.jsonl"], {}),
    ("domain.sh", ["a.jsonl", "1"], {}),
    ("equal_time.sh", ["a.jsonl", "1"], {}),
    ("gpu_30m.sh", [], {"DATA": "data/ready"}),
    ("multinode.sh", ["2", "head:1", "8", "a.toml"], {}),
    ("own_text.sh", ["a.jsonl"], {}),
    ("quickstart.sh", [], {}),
    ("shakespeare_char.sh", ["a.jsonl"], {}),
    ("slurm.sbatch", ["a.toml"], {}),
    ("study.sh", ["a.jsonl", "dot", "tau + gate"], {"SEEDS": "1", "TEXT": "a.jsonl"}),
    ("sweep.sh", ["a", "a.toml", "1 2"], {}),
    ("tau_30m.sh", ["a.jsonl"], {}),
    ("tau_modes.sh", [], {}),
    ("test.sh", [], {}),
)
SUMMED = "equal_time.sh", "study.sh"  # their runs go on beside one that fails; then they end with 1


@pytest.fixture
def start(tmp_path):
    """A function that starts a script, through a link in another folder, in a fresh checkout with programs that only note their call."""
    copy, links, programs = tmp_path / "checkout", tmp_path / "links", tmp_path / "programs"
    for folder in (links, programs):
        folder.mkdir()
    for name in ("python", "torchrun", "srun", "ruff"):
        (programs / name).write_text(STUB)
    (programs / "scontrol").write_text('#!/usr/bin/env bash\n[ $1 = show ] && echo n1 || echo "$@" >> "$CALLS"\n')
    (programs / "scancel").write_text("#!/usr/bin/env bash\necho cancelled >> out/cancelled\n")
    (programs / "timeout").write_text('#!/usr/bin/env bash\nshift 3; "$@" && exit 124\n')  # reached
    for program in programs.iterdir():
        program.chmod(0o755)
    (links / "a.jsonl").write_text("text")
    (links / "a.toml").write_text("")

    def start(script, args, fails="", **settings):
        shutil.rmtree(copy, ignore_errors=True)
        for folder in ("runs", "configs"):
            shutil.copytree(ROOT / folder, copy / folder)
        for folder in ("out", "results", ".venv/bin", "data/ready", "data/python_docs", "data/shakespeare_char"):
            (copy / folder).mkdir(parents=True)
        for file in (".venv/bin/activate", *(f"data/ready/{name}" for name in ("train.bin", "val.bin", "laplacian.parquet"))):
            (copy / file).touch()
        (links / script).unlink(missing_ok=True)
        (links / script).symlink_to(copy / "runs" / script)
        (tmp_path / "calls").write_text("")
        slurm = {"SLURM_SUBMIT_DIR": copy, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2"}
        settings |= {key: str(value) for key, value in slurm.items()} | {"SLURM_GPUS_ON_NODE": "8", "PYTHON": "python"}
        settings |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "FAILS": fails}
        return subprocess.Popen(
            ["bash", links / script, *args],
            cwd=links,
            env=os.environ | settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    start.calls, start.programs, start.copy = tmp_path / "calls", programs, copy
    return start


@pytest.mark.parametrize("script,args,settings", SCRIPTS, ids=[script for script, *_ in SCRIPTS])
def test_a_script_hands_on_the_status_of_what_fails_in_it(start, script, args, settings):
    if script != "equal_time.sh":
        (start.programs / "timeout").write_text('#!/usr/bin/env bash\n[ "$1" != -s ] || shift 4\nshift; "$@"\n')
    process = start(script, args, **settings)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    calls = start.calls.read_text().splitlines()
    programs = list(dict.fromkeys(calls))
    assert programs, calls
    for program in programs:
        process = start(script, args, fails=program, **settings)
        _, said = process.communicate(timeout=100)
        expected = 1 if program == "ruff format" or script in SUMMED and program == "python train.py" else 7
        assert process.returncode == expected, (program, process.returncode, said)
        if expected == 7:
            assert start.calls.read_text().splitlines() == calls[: calls.index(program) + 1]


def test_slurm_puts_a_job_back_into_the_queue(start):
    (start.programs / "srun").write_text("#!/usr/bin/env bash\ntouch out/started\nuntil [ -f out/cancelled ]; do sleep 0.02; done\n")
    process = start("slurm.sbatch", ["a.toml"])
    while not (start.copy / "out/started").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0 and "time is up" in out, said
    assert start.calls.read_text().splitlines()[-1] == "requeue 5"
