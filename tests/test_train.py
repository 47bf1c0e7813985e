import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import fields

import pytest
import torch

import checkpoint
from build_laplacian import load_laplacian
from config import Settings
from conftest import ROOT, fails, metrics, ok, run_script, untimed
from data.corpus import Corpus
from model import ModelConfig
from test_data import write_jsonl


@pytest.fixture
def here(work, tmp_path):
    """A fresh folder with the corpus and the config of `work`."""
    for name in ("docs", "small.toml"):
        (tmp_path / name).symlink_to(work / name)
    return tmp_path


def weights(path):
    return checkpoint.read(path)[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_metrics(work):
    records = metrics(work / "out" / "small")
    val = [record for record in records if record["split"] == "val"]
    train = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in val] == [0, 5, 10, 15, 20]
    assert [record["step"] for record in train] == [1, *range(2, 21, 2)]
    assert all(record["tokens"] == record["step"] * 4 * 2 * 32 for record in records)
    assert [record["lr"] for record in train][:3] == pytest.approx([3e-3 / 6, 3e-3 * 2 / 6, 3e-3 * 4 / 6])
    assert val[-1]["loss"] < val[0]["loss"] - 0.2
    corpus = Corpus(work / "docs")
    tokens_per_byte = corpus.meta["val"]["tokens"] / corpus.meta["val"]["bytes"]
    assert val[0]["bits_per_byte"] == pytest.approx(val[0]["loss"] / 0.6931472 * tokens_per_byte)
    assert val[0]["E_p05"] < val[0]["tau"] < val[0]["E_p95"]


def test_checkpoint_holds_what_it_takes(work):
    tensors, header = checkpoint.read(work / "out" / "small" / "last.safetensors")
    assert torch.equal(tensors["laplacian"], torch.from_numpy(load_laplacian(work / "docs" / "laplacian.parquet")))
    assert header["tokenizer"] == json.loads((work / "docs" / "tokenizer.json").read_text())
    assert header["config"]["n_kv_head"] == 2 and header["run"]["step"] == 20
    assert not any(name.startswith("optimizer.") for name in weights(work / "out" / "small" / "best.safetensors"))


def test_same_run_twice_and_dot_ignores_the_laplacian(here):
    for name in "ab":
        ok("train.py", "small.toml", "--attention=dot", "--laplacian=absent", f"--out_dir={name}", cwd=here)
    assert untimed(metrics(here / "a")) == untimed(metrics(here / "b"))
    assert "laplacian" not in weights(here / "a" / "last.safetensors")


def test_killed_and_resumed(here, work):
    """kill -9 after the checkpoint of step 10, then resume: metrics and weights are those of the unbroken run."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "small.toml", "--out_dir=r"], cwd=here,
                               stdout=subprocess.DEVNULL)
    while not (here / "r" / "last.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(here / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "tokens": 3072, "split": "train", "lo')  # a line that was being written
    ok("train.py", "small.toml", "--out_dir=r", "--init_from=resume", cwd=here)
    assert untimed(metrics(here / "r")) == untimed(metrics(work / "out" / "small"))
    assert same(weights(here / "r" / "last.safetensors"), weights(work / "out" / "small" / "last.safetensors"))
    before = (here / "r" / "metrics.jsonl").read_bytes()
    assert "nothing to do" in ok("train.py", "small.toml", "--out_dir=r", "--init_from=resume", cwd=here)
    assert (here / "r" / "metrics.jsonl").read_bytes() == before


def test_two_processes_equal_one(here, work):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1",
                           "--nproc_per_node=2", ROOT / "train.py", "small.toml", "--out_dir=two"], cwd=here,
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(here / "two"), metrics(work / "out" / "small"), strict=True):
        assert ours["step"] == theirs["step"] and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_start_from_another_run(here, work):
    """On a second domain, in the first one's vocabulary: weights and Laplacian stay, tau is calibrated anew."""
    write_jsonl(here / "mine.jsonl", 200)
    ok("data/jsonl/prepare.py", "mine.jsonl", f"--tokenizer={work}/out/small", "--out_dir=mine", "--val_fraction=0.2", cwd=here)
    (here / "fine.toml").write_text(f'init_from = "{work}/out/small"\ndata_dir = "mine"\nmax_steps = 1\nlearning_rate = 1e-9')
    ok("train.py", "fine.toml", cwd=here)
    ours, theirs = weights(here / "out/fine/last.safetensors"), weights(work / "out/small/best.safetensors")
    torch.testing.assert_close(ours["model.head.weight"], theirs["model.head.weight"])
    assert torch.equal(ours["laplacian"], theirs["laplacian"]) and ours["model.tau"] != theirs["model.tau"]


def test_memory_can_be_swapped_and_evaluated(here):
    ok("build_laplacian.py", "--graph=chain", "--dim=32", "--out=chain.parquet", cwd=here)
    ok("train.py", "small.toml", "--temperature=0.01", "--out_dir=sharp", cwd=here)  # where the Laplacian shows
    before = (here / "sharp" / "metrics.jsonl").read_bytes()
    evaluate = ["train.py", "small.toml", "--temperature=0.01", "--init_from=sharp", "--out_dir=sharp", "--eval_only=True"]
    own, chain = ok(*evaluate, cwd=here), ok(*evaluate, "--laplacian=chain.parquet", cwd=here)
    best = min(record["loss"] for record in metrics(here / "sharp") if record["split"] == "val")
    assert f"validation loss {best:.4f}" in own and own != chain
    assert (here / "sharp" / "metrics.jsonl").read_bytes() == before


def test_plateau_halves_the_rate(here):
    """At a rate so large that validation seldom improves."""
    ok("train.py", "small.toml", "--lr_schedule=plateau", "--plateau_patience=1", "--learning_rate=2.0", "--eval_interval=1",
       "--log_interval=1", "--max_steps=14", "--warmup_steps=0", "--grad_clip=0", "--out_dir=p", cwd=here)
    records = metrics(here / "p")
    val = [record["loss"] for record in records if record["split"] == "val"]
    scale, best, expected = 1.0, float("inf"), []
    for loss in val[:-1]:
        if loss >= best:
            scale = max(scale / 2, 0.03125)
        best = min(best, loss)
        expected.append(2.0 * scale)
    assert [record["lr"] for record in records if record["split"] == "train"] == expected
    assert expected[-1] < 2.0


def test_cosine_ends_at_min_lr(here):
    ok("train.py", "small.toml", "--lr_schedule=cosine", "--lr_decay_steps=10", "--min_lr=1e-4", "--log_interval=1",
       "--max_steps=13", "--out_dir=c", cwd=here)
    rates = [record["lr"] for record in metrics(here / "c") if record["split"] == "train"]
    assert rates[4] < rates[5] == 3e-3 > rates[6] > rates[9] > 1e-4
    assert rates[10:] == pytest.approx([1e-4] * 3)


def test_compiled_and_bfloat16(here, work):
    ok("train.py", "small.toml", "--compile=True", "--dropout=0.0", "--max_steps=4", "--out_dir=c", cwd=here)
    ok("train.py", "small.toml", "--dropout=0.0", "--max_steps=4", "--out_dir=e", cwd=here)
    ok("train.py", "small.toml", "--dropout=0.0", "--max_steps=4", "--dtype=bfloat16", "--out_dir=b", cwd=here)
    for compiled, eager, half in zip(*(metrics(here / name) for name in "ceb"), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], abs=1e-3)
        assert half["loss"] == pytest.approx(eager["loss"], abs=0.05)


def test_wandb_offline(here):
    ok("train.py", "small.toml", "--wandb_log=True", "--max_steps=2", "--out_dir=w", cwd=here,
       env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert list((here / "w" / "wandb").glob("offline-run-*/*.wandb"))


def test_help_lists_every_setting():
    text = run_script("train.py", "--help", cwd=ROOT).stdout
    assert all(f"--{f.name} " in text for f in fields(Settings))


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_configs(here, config):
    """Every setting is valid, and fits a model."""
    assert "nowhere" in fails("train.py", config, "--data_dir=nowhere", cwd=here)
    settings = Settings(**tomllib.loads(config.read_text()))
    model = ModelConfig(**{f.name: getattr(settings, f.name) for f in fields(ModelConfig) if f.name != "vocab_size"})
    assert model.head_size in (32, 64)


@pytest.mark.parametrize("args, expected", [
    (["absent.toml"], "absent.toml"), (["small.toml", "--n_layers=3"], "n_layers"), (["small.toml", "--n_layer=3.5"], "n_layer"),
    (["small.toml", "--n_layer=0"], "positive"), (["small.toml", "--compile=yes"], "True or False"),
    (["small.toml", "--attention=flash"], "tau, dot"), (["small.toml", "--learning_rate=nan"], "learning_rate"),
    (["small.toml", "--tau_mode=magic"], "tau_mode"), (["small.toml", "--n_head=5"], "n_head=5"),
    (["small.toml", "--n_kv_head=3"], "n_kv_head=3"), (["small.toml", "--device=abacus"], "abacus"),
    (["unknown.toml"], "'n_layers'"), (["type.toml"], "n_layer"), (["bool.toml"], "n_layer"), (["broken.toml"], "TOML"),
    (["small.toml", "--data_dir=nowhere"], "nowhere"), (["small.toml", "--laplacian=absent.parquet"], "build_laplacian.py"),
    (["small.toml", "--laplacian=nine.parquet"], "F=9 features; they must be as many as the head size, 8, or as n_embd, 32"),
    (["small.toml", "--laplacian=truncated.parquet"], "truncated.parquet"),
    (["small.toml", "--block_size=999999"], "block_size = 999999"), (["small.toml", "--init_from=resume"], "nothing to resume"),
    (["small.toml", "--init_from=nowhere"], "nowhere"), (["small.toml", "--init_from={work}/out/small", "--n_layer=3"], "n_layer = 3"),
    (["small.toml", "--init_from={work}/out/small", "--data_dir=other"], "vocabulary of other (290 tokens)"),
    (["small.toml", "--init_from=cut"], "cut/last.safetensors is damaged"), (["small.toml", "--out_dir=cut"], "holds a run already"),
    (["small.toml", "--eval_only=True"], "eval_only"), (["small.toml", "--seed=99999999999999999999"], "seed"),
    (["small.toml", "--learning_rate=inf"], "learning_rate"), (["deep.toml"], "TOML"), (["small.toml", "--out_dir=small.toml"], "small.toml"),
    (["small.toml", "--init_from=folder"], "folder/last.safetensors is damaged"),
    (["small.toml", "--init_from=resume", "--out_dir=resumed", "--max_steps=30"], "metrics.jsonl, line 3 is damaged"),
    (["small.toml", "--init_from=resume", "--out_dir=swapped", "--max_steps=30", "--laplacian=chain.parquet"], "is not the Laplacian"),
    (["small.toml", "--init_from=resume", "--out_dir=swapped", "--eval_only=True", "--laplacian=absent.parquet"], "absent.parquet"), (["small.toml", "--data_dir=past"], "past its vocabulary"),
    (["small.toml", "--data_dir=short"], "damaged corpus in short"),
    (["small.toml", "--lr_schedule=cosine", "--min_lr=1"], "min_lr"), (["small.toml", "--grad_accum_steps=1.5"], "grad_accum_steps")])
def test_mistakes(here, work, args, expected):
    (here / "unknown.toml").write_text("n_layers = 3")
    (here / "type.toml").write_text('n_layer = "3"')
    (here / "bool.toml").write_text("n_layer = true")
    (here / "broken.toml").write_text("n_layer = ")
    (here / "deep.toml").write_text("n_layer = " + "[" * 5000)
    (here / "folder" / "last.safetensors").mkdir(parents=True)
    arguments = " ".join(args)
    for name in ("resumed", "swapped"):
        if name in arguments:
            shutil.copytree(work / "out" / "small", here / name)
    if "resumed" in arguments:
        lines = (here / "resumed" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (here / "resumed" / "metrics.jsonl").write_text("".join([*lines[:2], "garbage\n", *lines[3:]]))
    if "chain" in arguments:
        ok("build_laplacian.py", "--graph=chain", "--dim=32", "--out=chain.parquet", cwd=here)
    if "nine" in arguments:
        ok("build_laplacian.py", "--graph=chain", "--dim=9", "--out=nine.parquet", cwd=here)
    (here / "truncated.parquet").write_bytes((work / "docs" / "laplacian.parquet").read_bytes()[:-100])
    if "other" in arguments:
        write_jsonl(here / "a.jsonl")
        ok("data/jsonl/prepare.py", "a.jsonl", "--vocab_size=290", "--out_dir=other", cwd=here)
    (here / "cut").mkdir()
    (here / "cut" / "last.safetensors").write_bytes((work / "out" / "small" / "last.safetensors").read_bytes()[:-100])
    for name in ("past", "short"):
        shutil.copytree(work / "docs", here / name)
    (here / "short" / "train.bin").write_bytes((here / "short" / "train.bin").read_bytes()[:-2])
    (here / "past" / "train.bin").write_bytes(b"\xff" * (here / "past" / "train.bin").stat().st_size)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    line = fails("train.py", *[arg.format(work=work) for arg in args], cwd=here)
    assert expected in line
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_run_is_replaced_only_when_asked(here):
    run = ["train.py", "small.toml", "--max_steps=2", "--out_dir=o"]
    ok(*run, cwd=here)
    first = (here / "o" / "metrics.jsonl").read_bytes()
    assert "--overwrite=True" in fails(*run, "--seed=2", cwd=here)
    assert (here / "o" / "metrics.jsonl").read_bytes() == first
    ok(*run, "--seed=2", "--overwrite=True", cwd=here)
    assert len(metrics(here / "o")) == len(first.splitlines()) and (here / "o" / "metrics.jsonl").read_bytes() != first


def test_what_is_not_finite_is_not_kept(here):
    done = run_script("train.py", "small.toml", "--learning_rate=2e9", "--weight_decay=1e9", "--grad_clip=0", "--warmup_steps=0",
                      "--log_interval=50", "--checkpoint_interval=1", "--eval_interval=50", "--out_dir=n", cwd=here)
    assert done.returncode == 1 and "is not finite" in done.stderr.splitlines()[-1]
    for path in (here / "n").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in weights(path).values())


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.99])
def test_truncated_checkpoint(tmp_path, work, fraction):
    content = (work / "out" / "small" / "last.safetensors").read_bytes()
    (tmp_path / "last.safetensors").write_bytes(content[:int(len(content) * fraction)])
    with pytest.raises(checkpoint.UserError, match="damaged"):
        checkpoint.read(tmp_path / "last.safetensors")
