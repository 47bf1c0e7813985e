import fcntl
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ["TQDM_DISABLE"] = "1"  # an error must be the only line on standard error


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a CUDA device, and is skipped without one")


def pytest_collection_modifyitems(items):
    """Those of half a minute and more first, so that no process has nothing to do while another is at the last of them."""
    long = ("test_quickstart_and_study", "test_changed_files", "test_gpu_30m", "test_tau_30m_goes_on", "test_own_text")
    items.sort(key=lambda item: not item.name.startswith(long))


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


# Scripts run as a user runs them, a process each, but forked from one that has imported their packages, which takes seconds; also those
# that are imported when they are needed: torch._dynamo by an optimizer, scikit-learn by LSA.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    ["conftest", "train", "sample", "plot", "export", "data.embed", "studies.energy", "decoding.stream"]
    + ["torch._dynamo", "torch.utils.cpp_extension", "sklearn.decomposition", "sklearn.feature_extraction.text"]
)


def as_main(script, args, cwd, out, err):
    os.chdir(cwd)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [str(script), *args]
    runpy.run_path(str(script), run_name="__main__")


def run_script(name, *args, cwd, stdin=None, env=None, limit=300):
    """A script of the project, from another folder: its CompletedProcess."""
    script, args = ROOT / name, [str(arg) for arg in args]
    if stdin is not None or env is not None:
        return subprocess.run(
            [sys.executable, script, *args],
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **(env or {})},
        )
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = WARM.Process(target=as_main, args=(script, args, str(cwd), out, err))
        process.start()
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{name} {args}")
        return subprocess.CompletedProcess(
            [str(script), *args], process.exitcode, *(path.read_text() if path.exists() else "" for path in (out, err))
        )


def ok(name, *args, cwd, **more):
    done = run_script(name, *args, cwd=cwd, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(name, *args, cwd, **more):
    """The one line on standard error of a script that ends with exit code 2."""
    done = run_script(name, *args, cwd=cwd, **more)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def shared_data(name):
    """A file of the folder that TAUFORMER_DATA names; skips the test where it is not set."""
    if "TAUFORMER_DATA" not in os.environ:
        pytest.skip("TAUFORMER_DATA is not set: it names a folder of real text and embeddings")
    return Path(os.environ["TAUFORMER_DATA"]).resolve() / name


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(records):
    return [{key: value for key, value in record.items() if key not in ("tokens_per_s", "elapsed_s", "peak_mem_mb")} for record in records]


CONFIG = """
data_dir = "docs"
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 32
block_size = 32
dropout = 0.1
batch_size = 4
grad_accum_steps = 2
max_steps = 20
learning_rate = 3e-3
warmup_steps = 5
eval_interval = 5
eval_iters = 4
log_interval = 2
checkpoint_interval = 10
diag_interval = 10
"""


def prepare(folder):
    """docs/ with corpus, embeddings and Laplacian, and small.toml."""
    ok("data/python_docs/prepare.py", "--out_dir=docs", "--vocab_size=300", cwd=folder)
    ok("data/embed.py", "docs", "--dim=32", cwd=folder)
    ok("build_laplacian.py", "docs/embeddings.npy", "--out=docs/laplacian.parquet", cwd=folder)
    (folder / "small.toml").write_text(CONFIG)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder as a user has it after the first steps: what prepare() makes, and out/small, the run of it; one for all processes of
    pytest-xdist. Tests write only to folders of their own."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    work = shared / "work"
    with open(shared / "work.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not work.exists():
            work.mkdir()
            prepare(work)
            ok("train.py", "small.toml", cwd=work)
    return work


@pytest.fixture
def here(work, tmp_path):
    """A fresh folder with the corpus and the config of `work`."""
    for name in ("docs", "small.toml"):
        (tmp_path / name).symlink_to(work / name)
    return tmp_path
