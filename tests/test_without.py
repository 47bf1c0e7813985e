"""What the programs reach for and may not find: packages, a folder for what is compiled. (tests/runs/test_quickstart.py: programs.)"""

import os
import pwd
import subprocess
import sys

import pytest
from conftest import ROOT

from ops.attention import compiled


def test_a_package_that_is_missing_is_named_in_one_line_by_what_needs_it(here):
    (here / "site").mkdir()
    (here / "site/sitecustomize.py").write_text("import os, sys\nsys.modules |= dict.fromkeys(os.environ['MISSING'].split())\n")
    (here / "a.jsonl").write_text('{"text": "a word"}\n{"text": "another word"}\n')

    def without(packages, script, *args):
        environment = {**os.environ, "PYTHONPATH": str(here / "site"), "MISSING": packages}
        return subprocess.run([sys.executable, ROOT / script, *args], cwd=here, capture_output=True, text=True, env=environment)

    prepare = ("data/jsonl/prepare.py", "a.jsonl", "--out_dir=new")
    train = ("train.py", "small.toml", "--max_steps=1", "--warmup_steps=0", "--eval_iters=1", "--out_dir=new")
    for package, module, *command in (
        ("numpy", "numpy", "build_laplacian.py", "--graph=chain", "--dim=4", "--out=new"),
        ("pyarrow", "pyarrow", "build_laplacian.py", "--graph=chain", "--dim=4", "--out=new"),
        ("scipy", "scipy", "build_laplacian.py", "--graph=random", "--dim=4", "--out=new.parquet"),
        ("tqdm", "tqdm", *prepare),
        ("safetensors", "safetensors", *train),
        ("tiktoken", "tiktoken", *prepare),
        ("rustbpe", "rustbpe", *prepare),
        ("datasets", "datasets", "data/shakespeare_char/prepare.py", "--out_dir=new"),
        ("scikit-learn", "sklearn", "data/embed.py", "docs", "--dim=4", "--overwrite"),
        ("matplotlib", "matplotlib", "plot.py", "new"),
        ("torch", "torch", *train),
        ("wandb", "wandb", *train, "--wandb_log=True"),
    ):
        done = without(module, *command)
        assert done.returncode == 2, (package, done.stderr)
        line = f"{command[0].rpartition('/')[2]}: error: {package} is not installed: pip install -r {ROOT / 'requirements.txt'}\n"
        assert done.stderr == line, (package, done.stderr)
        assert not [path.name for path in here.iterdir() if path.name.startswith("new")], package

    done = without("wandb datasets matplotlib sklearn rustbpe ninja", *train, "--block_size=256", "--batch_size=1")
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.startswith("tau attention on cpu: tree (attention.cpp could not be compiled: ") and len(done.stderr.splitlines()) == 1
    )


def test_interrupted_while_it_imports(here):
    for module, *command in (
        ("numpy", "train.py", "small.toml", "--out_dir=new"),
        ("tqdm", "sample.py", "new"),
        ("matplotlib", "plot.py", "new"),
        ("numpy", "build_laplacian.py", "--inspect", "new"),
        ("numpy", "data/sizes.py", "small.toml"),
        ("numpy", "data/text/prepare.py", "small.toml"),
        ("numpy", "studies/energy.py", "docs"),
    ):
        site = here / f"interrupts_{module}"
        site.mkdir(exist_ok=True)
        (site / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=here, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", ""), (command, done)


def test_an_interruption_that_is_dropped_comes_again(tmp_path):
    (tmp_path / "dropped.py").write_text(
        "import common, time\nclass Interrupted:\n    def __del__(self):\n        raise KeyboardInterrupt\nInterrupted()\ntime.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "dropped.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_without_a_folder_for_what_is_compiled(tmp_path, monkeypatch):
    def no_entry(user):
        raise KeyError(user)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.devnull)
    with pytest.raises(RuntimeError, match="Not a directory.*TORCH_EXTENSIONS_DIR may name a folder for it"):
        compiled("ops/attention.cpp", "unused")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    for name in ("HOME", "PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)  # as in a container with a number for a user
    with pytest.raises(RuntimeError, match="no home folder.*TORCH_EXTENSIONS_DIR may name a folder for it"):
        compiled("ops/attention.cpp", "unused")
    assert not list(tmp_path.iterdir())
