import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fails, metrics, ok, run_script, untimed
from test_data import write_jsonl

from build_laplacian import load_laplacian
from common import Parser, UserError, output_folder, replacing, told, waiting
from data.corpus import Corpus
from model import ModelConfig
from ops import attention
from training import checkpoint, memory
from training.batches import training_batch
from training.config import Settings, parse

TAU = "model.blocks.0.attention.log_tau"


def weights(path):
    return checkpoint.read(path)[0]


def last(folder):
    """The tensors of the newest checkpoint."""
    return weights(checkpoint.steps(folder)[0])


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
    tensors, header = checkpoint.read(work / "out" / "small" / "step_00000020.safetensors")
    assert torch.equal(tensors["laplacian"], torch.from_numpy(load_laplacian(work / "docs" / "laplacian.parquet")))
    assert header["tokenizer"] == json.loads((work / "docs" / "tokenizer.json").read_text())
    assert header["config"]["n_kv_head"] == 2 and header["run"]["step"] == 20
    assert not any(name.startswith("optimizer.") for name in weights(work / "out" / "small" / "best.safetensors"))


def test_same_run_twice_and_dot_ignores_the_laplacian(here):
    for name in "ab":
        ok("train.py", "small.toml", "--attention=dot", "--laplacian=absent", f"--out_dir={name}", cwd=here)
    assert untimed(metrics(here / "a")) == untimed(metrics(here / "b"))
    assert "laplacian" not in last(here / "a")


def test_start_from_another_run(here, work):
    """On a second domain, in the first one's vocabulary: weights and Laplacian stay, tau is calibrated anew."""
    write_jsonl(here / "mine.jsonl", 200)
    ok("data/jsonl/prepare.py", "mine.jsonl", f"--tokenizer={work}/out/small", "--out_dir=mine", "--val_fraction=0.2", cwd=here)
    (here / "fine.toml").write_text(f'init_from = "{work}/out/small"\ndata_dir = "mine"\nmax_steps = 1\nlearning_rate = 1e-9')
    ok("train.py", "fine.toml", cwd=here)
    ours, theirs = last(here / "out/fine"), weights(work / "out/small/best.safetensors")
    torch.testing.assert_close(ours["model.head.weight"], theirs["model.head.weight"])
    assert torch.equal(ours["laplacian"], theirs["laplacian"]) and not torch.equal(ours[TAU], theirs[TAU])


def test_memory_can_be_swapped_and_evaluated(here):
    ok("build_laplacian.py", "--graph=chain", "--dim=32", "--out=chain.parquet", cwd=here)
    ok("train.py", "small.toml", "--temperature=0.01", "--learning_rate=2e-2", "--out_dir=sharp", cwd=here)  # where the Laplacian shows
    before = (here / "sharp" / "metrics.jsonl").read_bytes()
    evaluate = ["train.py", "small.toml", "--temperature=0.01", "--init_from=sharp", "--out_dir=sharp", "--eval_only=True"]
    own, chain = ok(*evaluate, cwd=here), ok(*evaluate, "--laplacian=chain.parquet", cwd=here)
    best = min(record["loss"] for record in metrics(here / "sharp") if record["split"] == "val")
    assert f"validation loss {best:.4f}" in own and own != chain
    kept, measured = chain.splitlines()
    assert kept.endswith("with tau as it was") and measured.endswith("energies of this Laplacian")
    assert kept.split(",")[0] != measured.split(",")[0]
    assert (here / "sharp" / "metrics.jsonl").read_bytes() == before


def test_every_extra_trains_resumes_and_samples(here):
    extras = [
        "--learn_temperature=True",
        "--forget=gate",
        "--spectral_filter=True",
        "--conv=3",
        "--key_bias=True",
        "--output_gate=True",
        "--local_heads=2",
        "--local_window=8",
        "--tau_scope=head",
    ]
    ok("train.py", "small.toml", *extras, "--out_dir=whole", cwd=here)
    ok("train.py", "small.toml", *extras, "--max_steps=10", "--out_dir=x", cwd=here)
    ok("train.py", "small.toml", "--init_from=resume", "--out_dir=x", cwd=here)  # the model is the checkpoint's
    assert untimed(metrics(here / "x")) == untimed(metrics(here / "whole"))
    val = [record["loss"] for record in metrics(here / "x") if record["split"] == "val"]
    assert val[-1] < val[0] - 0.2
    assert ok("sample.py", "x", "--max_new_tokens=40", cwd=here)


def test_plateau_halves_the_rate(here):
    """At a rate so large that validation seldom improves."""
    ok(
        "train.py",
        "small.toml",
        "--lr_schedule=plateau",
        "--plateau_patience=1",
        "--learning_rate=2.0",
        "--eval_interval=1",
        "--log_interval=1",
        "--max_steps=14",
        "--warmup_steps=0",
        "--grad_clip=0",
        "--out_dir=p",
        cwd=here,
    )
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
    ok(
        "train.py",
        "small.toml",
        "--lr_schedule=cosine",
        "--lr_decay_steps=10",
        "--min_lr=1e-4",
        "--log_interval=1",
        "--max_steps=13",
        "--out_dir=c",
        cwd=here,
    )
    rates = [record["lr"] for record in metrics(here / "c") if record["split"] == "train"]
    assert rates[4] < rates[5] == 3e-3 > rates[6] > rates[9] > 1e-4
    assert rates[10:] == pytest.approx([1e-4] * 3)


def test_compiled_and_bfloat16(here, work):
    for name, how in ("c", "--compile=True"), ("e", "--dtype=float32"), ("b", "--dtype=bfloat16"):
        ok("train.py", "small.toml", "--n_layer=1", "--dropout=0.0", "--max_steps=4", f"--out_dir={name}", how, cwd=here)
    for compiled, eager, half in zip(*(metrics(here / name) for name in "ceb"), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], abs=1e-3)
        assert half["loss"] == pytest.approx(eager["loss"], abs=0.05)


def test_wandb_offline(here):
    ok(
        "train.py",
        "small.toml",
        "--wandb_log=True",
        "--max_steps=2",
        "--out_dir=w",
        cwd=here,
        env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    assert list((here / "w" / "wandb").glob("offline-run-*/*.wandb"))


def test_help_lists_every_setting():
    """In groups, with choices and defaults."""
    text = run_script("train.py", "--help", cwd=ROOT).stdout
    assert all(f"--{f.name} " in text for f in fields(Settings))
    groups = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[2:] == [f"{f.metadata['group']}:" for f in fields(Settings) if f.metadata["group"]] and len(groups) == 9
    assert "--lr_schedule {constant,cosine,plateau}" in text and "--compile [BOOL]" in text and "[0.0005]" in text


def test_the_help_of_a_corpus_names_its_own_defaults():
    for name, tokenizer, fraction in (("openwebtext", "gpt2", "0.0005"), ("shakespeare_char", "char", "0.1"), ("jsonl", "bpe", "0.01")):
        text = " ".join(run_script(f"data/{name}/prepare.py", "--help", cwd=ROOT).stdout.split())
        assert f"(default: {tokenizer})" in text and f"(default: {fraction})" in text, name


def asked(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return parse("\n    python train.py configs/quickstart.toml --seed=2\n")


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["CONFIG", "--compile"], "compile", True),
        (["--compile", "CONFIG"], "compile", True),
        (["CONFIG", "--compile", "False"], "compile", False),
        (["CONFIG", "--tau_rope=false"], "tau_rope", False),
        (["CONFIG", "--weight-decay=0.2"], "weight_decay", 0.2),
        (["--max_steps", "10", "CONFIG"], "max_steps", 10),
        (["CONFIG", "--max-steps", "1_000"], "max_steps", 1000),
        (["CONFIG", "--batch_size=1e3"], "batch_size", 1000),
        (["CONFIG", "--batch_size=1.6E+1"], "batch_size", 16),
        (["CONFIG", "--learning_rate=1"], "learning_rate", 1.0),
        (["CONFIG", "--seed=1", "--seed=2"], "seed", 2),
        (["CONFIG", "--out_dir", "x"], "out_dir", "x"),
        (["CONFIG", "--device=cuda:1"], "device", "cuda:1"),
    ],
)
def test_options_as_fingers_know_them(here, monkeypatch, words, name, value):
    settings, given = asked(monkeypatch, *[here / "small.toml" if word == "CONFIG" else word for word in words])
    assert getattr(settings, name) == value and type(getattr(settings, name)) is type(value)
    assert given[name] == "command line" != given["n_layer"]


def test_flags_of_other_scripts_take_true_and_false():
    parser = Parser("x")
    parser.add_argument("--skip_bad", action="store_true")
    for words, expected in ((["--skip-bad"], True), (["--skip_bad=True"], True), (["--skip_bad", "false"], False), ([], False)):
        assert parser.parse_args(words).skip_bad is expected
    with pytest.raises(UserError, match="--skip_bad=1 must be True or False"):
        parser.parse_args(["--skip_bad=1"])
    parser.add_argument("--prompt")
    assert parser.parse_args(["--prompt", "--- a text"]).prompt == "--- a text"
    with pytest.raises(UserError, match="--start=x, did you mean --prompt?"):
        parser.parse_args(["--start=x"])
    parser.add_argument("files", nargs="*")
    assert parser.parse_args(["a", "--prompt=x", "--", "-b.txt", "-", "--prompt"]).files == ["a", "./-b.txt", "-", "./--prompt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(tmp_path, number):
    code = f"""import os
from common import replacing, run
def main():
    with replacing("file") as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), {int(number)})
run(main)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 128 + number and not list(tmp_path.iterdir())


def test_what_a_killed_writer_leaves_goes_with_the_next(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [".file.1.tmp", ".file.x.tmp", f".other.{ended.pid}.tmp"]  # of a process that runs, of none, of another file
    for name in (f".file.{ended.pid}.tmp", *kept):
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "file"])


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "CONFIG.toml is missing, as in `python train.py configs/quickstart.toml --seed=2`"),
        (["quickstart"], "did you mean configs/quickstart.toml?"),
        (["configs/quickstart"], "did you mean configs/quickstart.toml?"),
        (["config/quikstart.py"], "did you mean configs/quickstart.toml?"),
        (["nope.toml"], "nope.toml does not exist, it should be a CONFIG.toml: there are configs/dot_124m.toml, configs/dot_30m.toml"),
        (["configs"], "configs is a folder"),
        (["n_layer=3"], "given after it, as --n_layer=3"),
        (["configs/quickstart.toml", "n_layer=3"], "did you mean --n_layer"),
        (["configs/quickstart.toml", "configs/study.toml"], "only one CONFIG.toml"),
        (["configs/quickstart.toml", "--compile", "maybe"], "maybe"),
        (["configs/quickstart.toml", "--max_steps"], "expected one argument"),
        (["--config=configs/quickstart.toml"], "CONFIG.toml stands by itself, without --config"),
        (["configs/quickstart.toml", "-lr=3"], "--learning_rate"),
    ],
)
def test_the_config_that_was_meant(monkeypatch, words, expected):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        asked(monkeypatch, *words)
    assert expected in str(error.value)


def test_mistakes_are_answered_without_torch(here, tmp_path):
    """Its import takes seconds."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/torch.py").write_text("raise ImportError('torch is imported')")
    env = {"PYTHONPATH": str(tmp_path / "stub")}
    (here / "broken.toml").write_text("n_layer = ")
    (here / "bare").mkdir()
    shutil.copytree(here / "docs", here / "bare/docs")
    (here / "bare/docs/laplacian.parquet").unlink()
    for words, expected in (
        (["train.py", "nope.toml"], "nope.toml"),
        (["train.py", "broken.toml"], "TOML"),
        (["train.py", "small.toml", "--lr=1"], "--learning_rate"),
        (["train.py", "small.toml", "--n_head=5"], "n_head=5"),
        (["train.py", "small.toml", "--data_dir=nowhere"], "no corpus in nowhere"),
        (["train.py", "small.toml", "--data_dir=bare/docs"], "no Laplacian at bare/docs/laplacian.parquet"),
        (["train.py", "small.toml", "--init_from=gpt2-xl"], "GPT-2's weights"),
        (["train.py", "small.toml", "--init_from=resume"], "nothing to resume"),
        (["bench.py", "atention"], "attention"),
        (["plot.py", "out/x", "--max_loss=0"], "max_loss"),
        (["build_laplacian.py", "--topk=0"], "topk"),
        (["sample.py", "x", "--top_p=2"], "top_p"),
    ):
        assert expected in fails(*words, cwd=here, env=env)
    assert "--n_layer INT" in ok("train.py", "--help", cwd=here, env=env)


def test_what_the_system_says_of_a_file_is_told_in_words(tmp_path):
    (tmp_path / "file").touch()
    for opens, said in (
        (lambda: open(tmp_path / "absent"), "absent does not exist, and is to be read"),
        (lambda: open(tmp_path / "no/file", "w"), f"no/file cannot be read or written: there is no folder {tmp_path}/no"),
        (lambda: open(tmp_path), "is a folder, where a file is meant"),
        (lambda: open(tmp_path / "file/x"), "file is a file, no folder"),
        (lambda: open(""), "an empty path names no file"),
        (lambda: open(tmp_path / "no/.a.parquet.12.tmp", "w"), "no/a.parquet cannot be read or written"),
    ):
        with pytest.raises(OSError) as error:
            opens()
        assert said in told(error.value) and "Errno" not in told(error.value)
    with pytest.raises(UserError, match="the folder .*file/c cannot be made .Not a directory.: give another --out_dir"):
        with output_folder(tmp_path / "file/c"):
            pass


def test_what_takes_long_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        with waiting("thinking"):
            while not sys.stderr.getvalue().endswith("\n"):
                time.sleep(0.05)
        with waiting("of nothing"):
            pass
        assert sys.stderr.getvalue() == "thinking ...\n"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for compiler, expected in (("no-such-compiler", ""), ("false", "compiling decode.cpp for this machine, once")):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises((RuntimeError, OSError)):
            attention.compiled("decoding/decode.cpp", "tauformer_nothing")
        assert "".join(capsys.readouterr().err.splitlines()[:1]).startswith(expected)


def test_a_run_keeps_its_lines_and_its_settings(here, work, monkeypatch):
    """config.toml is a CONFIG.toml again, of the same run."""
    first = ["small.toml", "--max_steps=2", "--min-lr=0.00001", '--wandb_run_name=a "name" \\ \x7f é', "--results=r.jsonl"]

    def logged(*args):
        """What a run says; log.txt ends with the lines of both streams."""
        done = run_script("train.py", *args, cwd=here)
        lines = (done.stdout + done.stderr).splitlines()
        assert done.returncode == 0 and "warmup_steps = 5 fills max_steps" in done.stderr
        assert sorted((here / "a/log.txt").read_text().splitlines()[-len(lines) :]) == sorted(lines)
        return lines

    header = logged(*first, "--out_dir=a")[0]
    assert header.startswith("a: 0.0") and " M parameters, tau attention with tau = " in header
    ok("train.py", "a/config.toml", "--out_dir=b", cwd=here)
    assert untimed(metrics(here / "a")) == untimed(metrics(here / "b"))
    one, two = ((here / name / "config.toml").read_text() for name in "ab")
    assert one.replace('out_dir = "a"', 'out_dir = "b"') == two
    hashes = [json.loads(line)["config"] for line in (here / "r.jsonl").read_text().splitlines()]
    assert len(hashes) == 2 and hashes[0] == hashes[1]

    (here / "a/step_00000003.safetensors").write_text("damaged")
    lines = logged("a/config.toml", "--init_from=resume", "--max_steps=3")
    assert lines[:2] == ["max_steps = 3 from here on, 2 before", "a: goes on at step 2 of 3, on 1 x cpu, float32"]
    log = (here / "a/log.txt").read_text().splitlines()
    assert log.count(header) == 1 and any("a/step_00000003.safetensors is damaged" in line for line in log)
    assert (here / "a/config.toml").read_text() == one.replace("max_steps = 2", "max_steps = 3")

    ok("train.py", "small.toml", f"--init_from={work / 'out/small'}", "--max_steps=1", "--out_dir=c", cwd=here)
    assert f'init_from = "{work}/out/small"' in (here / "c/config.toml").read_text()
    ok("train.py", "c/config.toml", "--overwrite", "--results=r.jsonl", cwd=here)
    ok("train.py", "c/config.toml", "--init_from=resume", "--max_steps=2", cwd=here)
    assert f'init_from = "{work}/out/small"' in (here / "c/config.toml").read_text()


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_configs(here, config):
    """Every setting is valid, and fits a model."""
    assert "nowhere" in fails("train.py", config, "--data_dir=nowhere", cwd=here)
    settings = Settings(**tomllib.loads(config.read_text()))
    model = ModelConfig(**{f.name: getattr(settings, f.name) for f in fields(ModelConfig) if f.name != "vocab_size"})
    assert model.head_size in (16, 32, 64)


@pytest.mark.parametrize(
    "option, expected",
    [
        ("n_layers=3", "did you mean --n_layer"),
        ("n_layer=3.5", "n_layer"),
        ("n_layer=0", "positive"),
        ("n_layer=1000000", "at most 10,000"),
        ("compile=yes", "True or False"),
        ("lr=1e-3", "did you mean --learning_rate"),
        ("max-iters=100", "did you mean --max_steps"),
        ("max_steps=5k", "such as 5000 or 5e3"),
        ("batch_size=1.5e0", "must be int"),
        ("batch_size=1e999", "batch_size"),
        ("dataset=openwebtext", "did you mean --data_dir=data/NAME"),
        ("gradient_accumulation_steps=40", "did you mean --grad_accum_steps"),
        ("warmup_iters=40", "did you mean --warmup_steps"),
        ("lr_decay_iters=40", "did you mean --lr_decay_steps"),
        ("always_save_checkpoint=True", "has none here: checkpoint_interval"),
        ("backend=nccl", "has none here"),
        ("decay_lr=False", "has none here: lr_schedule"),
        ("bias=False", "has none here: no layer"),
        ("num_train_epochs=3", "has none here: max_steps"),
        ("no-compile", "did you mean --compile=False"),
        ("resume", "did you mean --init_from=resume"),
        ("device=gpu", "cuda"),
        ("dtype=bf16", "bfloat16"),
        ("weight-decai=0.1", "did you mean --weight_decay"),
        ("attention=flash", "tau, dot"),
        ("learning_rate=nan", "learning_rate"),
        ("learning_rate=inf", "learning_rate"),
        ("tau_mode=magic", "tau_mode"),
        ("seed=99999999999999999999", "seed"),
        ("grad_accum_steps=1.5", "grad_accum_steps"),
        ("forget=all", "none, slope, gate"),
        ("conv=-1", "0 or more"),
        ("temperature=1e-12", "at least 1e-9"),
        ("local_window=0", "positive"),
        ("tau_scope=block", "global, head"),
        ("tau_percentile=101", "0 to 100"),
        ("tau_interval=0", "positive"),
        ("tau_smoothing=1.0", "below 1"),
        ("tau_drift=-1", "0 or more"),
        ("spike=nan", "spike"),
        ("skip_limit=-1", "0 or more"),
        ("ema_decay=1.0", "below 1"),
        ("diag_interval=-1", "0 or more"),
        ("keep_last=0", "positive"),
        ("shard=zero", "ddp, fsdp"),
        ("dry_run=1", "True or False"),
        ("profile=yes", "True or False"),
    ],
)
def test_bad_settings(here, monkeypatch, option, expected):
    monkeypatch.setattr(sys, "argv", ["train.py", str(here / "small.toml"), f"--{option}"])
    with pytest.raises(UserError, match=expected):
        parse("")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("n_layers = 3", "'n_layers'"),
        ('n_layer = "3"', "n_layer"),
        ("n_layer = true", "n_layer"),
        ("n_layer = 2.5", "n_layer"),
        ("decay_lr = true", "has none here"),
        ("max_iters = 10", "did you mean max_steps"),
        ("n_layer = ", "TOML"),
        ("n_layer = " + "[" * 5000, "TOML"),
    ],
)
def test_bad_configs(tmp_path, monkeypatch, text, expected):
    (tmp_path / "bad.toml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "bad.toml")])
    with pytest.raises(UserError, match=expected):
        parse("")


@pytest.mark.parametrize(
    "args, expected",
    [
        (["absent.toml"], "absent.toml"),
        (["small.toml", "--n_layers=3"], "n_layers"),
        (["broken.toml"], "TOML"),
        (["small.toml", "--n_head=5"], "n_head=5"),
        (["small.toml", "--local_heads=1"], "a multiple of 2"),
        (["small.toml", "--attention=dot", "--local_heads=2"], "has no spectral_filter"),
        (["small.toml", "--n_kv_head=3"], "n_kv_head=3"),
        (["small.toml", "--device=abacus"], "abacus"),
        (["small.toml", "--data_dir=nowhere"], "nowhere"),
        (["small.toml", "--laplacian=absent.parquet"], "build_laplacian.py"),
        (["small.toml", "--laplacian=nine.parquet"], "F=9 features; they must be as many as the head size, 8, or as n_embd, 32"),
        (["small.toml", "--laplacian=truncated.parquet"], "truncated.parquet"),
        (["small.toml", "--block_size=999999"], "block_size = 999999"),
        (["small.toml", "--init_from=resume"], "nothing to resume"),
        (["small.toml", "--init_from=nowhere"], "nowhere"),
        (["small.toml", "--init_from={work}/out/small", "--n_layer=3"], "n_layer = 3"),
        (["small.toml", "--init_from={work}/out/small", "--data_dir=other"], "the 290 tokens of other"),
        (["small.toml", "--init_from=cut"], "cut/step_00000020.safetensors is damaged"),
        (["small.toml", "--out_dir=cut"], "holds a run already"),
        (["small.toml", "--eval_only=True"], "eval_only"),
        (["small.toml", "--out_dir=small.toml"], "small.toml"),
        (["small.toml", "--init_from=folder"], "folder/best.safetensors is damaged"),
        (["small.toml", "--init_from=resume", "--out_dir=resumed", "--max_steps=30"], "metrics.jsonl, line 3 is damaged"),
        (["small.toml", "--init_from=resume", "--out_dir=swapped", "--max_steps=30", "--laplacian=chain.parquet"], "is not the Laplacian"),
        (["small.toml", "--init_from=resume", "--out_dir=swapped", "--eval_only=True", "--laplacian=absent.parquet"], "absent.parquet"),
        (["small.toml", "--data_dir=past"], "past its vocabulary"),
        (["small.toml", "--data_dir=short"], "damaged corpus in short"),
        (["small.toml", "--init_from=resume", "--out_dir=swapped", "--max_steps=30", "--tau_mode=learned"], "tau_mode = 'learned'"),
        (["small.toml", "--init_from=resume", "--out_dir=swapped", "--max_steps=30", "--embedding_init=domain"], "began as 'normal'"),
        (["small.toml", "--results=small.toml/runs.jsonl"], "small.toml"),
        (["small.toml", "--results=broken.toml"], "broken.toml is no JSON Lines file"),
        (["small.toml", "--out_dir={work}/docs"], "is a corpus"),
        (["small.toml", "--out_dir=notes"], "notes holds a run already (log.txt)"),
        (["small.toml", "--lr_schedule=cosine", "--min_lr=1"], "min_lr"),
    ],
)
def test_mistakes(here, work, args, expected):
    (here / "broken.toml").write_text("n_layer = ")
    (here / "folder" / "best.safetensors").mkdir(parents=True)
    (here / "notes").mkdir()
    (here / "notes" / "log.txt").write_text("mine\n")
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
    (here / "cut" / "step_00000020.safetensors").write_bytes(checkpoint.steps(work / "out" / "small")[0].read_bytes()[:-100])
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
    done = run_script(
        "train.py",
        "small.toml",
        "--learning_rate=2e9",
        "--weight_decay=1e9",
        "--grad_clip=0",
        "--warmup_steps=0",
        "--log_interval=50",
        "--checkpoint_interval=1",
        "--eval_interval=50",
        "--out_dir=n",
        cwd=here,
    )
    assert done.returncode == 1 and "try a learning_rate lower than 2000000000.0" in done.stderr.splitlines()[-1]
    for path in (here / "n").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in weights(path).values())


def test_running_mean_of_the_weights(here):
    ok(
        "train.py",
        "small.toml",
        "--ema_decay=0.5",
        "--checkpoint_interval=1",
        "--keep_last=30",
        "--max_steps=6",
        "--eval_interval=6",
        "--out_dir=m",
        cwd=here,
    )
    files = [weights(path) for path in reversed(checkpoint.steps(here / "m"))]
    name, mean = "head.weight", files[0]["model.head.weight"]
    for tensors in files[1:]:
        mean = mean.lerp(tensors[f"model.{name}"], 0.5)
        torch.testing.assert_close(tensors[f"ema.{name}"], mean)
    assert torch.equal(weights(here / "m" / "best.safetensors")[f"model.{name}"], files[-1][f"ema.{name}"])
    best = metrics(here / "m")[-1]["loss"]
    assert f"validation loss {best:.4f}" in ok("train.py", "small.toml", "--init_from=m", "--eval_only=True", cwd=here)


def test_dry_run_writes_nothing(here):
    out = ok("train.py", ROOT / "configs" / "quickstart_published.toml", "--data_dir=docs", "--n_embd=32", "--dry_run=True", cwd=here)
    parameters = 2 * 300 * 32 + 4 * 12 * 32 * 32
    assert f"parameters       {parameters:,}\n" in out and "tokens           2,048 a step, 3,072,000 in all\n" in out
    assert out.index("memory  ") < out.index("peak  ")
    assert "in 24 GB batch_size = 16 and grad_accum_steps = 1" in out
    assert "h for 1,500 steps" in out and sorted(path.name for path in here.iterdir()) == ["docs", "small.toml"]


def test_the_batch_that_fits(monkeypatch):
    w = torch.ones(1, requires_grad=True)
    T = 100
    assert memory.kept_a_sequence(lambda idx, targets: (w * idx).exp().sum(), torch.ones(1, T), torch.ones(1, T)) == 2 * 4 * T
    model = SimpleNamespace(config=SimpleNamespace(block_size=T, vocab_size=1), parameter_count=lambda: 0)
    settings = Settings(batch_size=6, grad_accum_steps=4)
    fits = lambda share: memory.fitting(model, settings, 2**30, share)  # a GB a sequence
    assert [fits(gigabytes) for gigabytes in (1, 5, 100)] == [None, (4, 6), (24, 1)]
    monkeypatch.setattr(memory, "WORLD", 2)
    assert [fits(gigabytes) for gigabytes in (1, 5, 100)] == [None, (4, 6), (12, 2)]


def test_profile(here):
    done = run_script("train.py", "small.toml", "--profile=True", "--max_steps=6", "--out_dir=p", cwd=here)
    assert done.returncode == 0 and "aten::mm" in done.stderr and "USDT" not in done.stderr and "STAGE" not in done.stderr
    events = json.loads((here / "p" / "profile.json").read_text())["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep") and event["ph"] == "X" for event in events) >= 3
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 3


def test_passes_see_every_window_once(here):
    """Over all processes and micro-batches, and in another order each time."""
    corpus = Corpus(here / "docs")
    corpus.train = corpus.train[: 32 * 30 + 1]
    settings = Settings(batch_size=4, grad_accum_steps=3, sampling="passes", seed=5)
    seen = [
        window[0].tobytes()
        for step in range(5)
        for micro in range(3)
        for window in training_batch(corpus, settings, 32, step, micro)[:, None]
    ]
    windows = [corpus.batch([start], 32, "train")[0].tobytes() for start in range(0, 32 * 30, 32)]
    assert sorted(seen[:30]) == sorted(seen[30:60]) == sorted(windows) and seen[:30] != seen[30:60]
    record = metrics_of(here, "--sampling=passes", "--max_steps=2")
    assert record != metrics_of(here, "--sampling=random", "--max_steps=2", "--overwrite=True")


def metrics_of(here, *options):
    ok("train.py", "small.toml", "--out_dir=p", *options, cwd=here)
    return untimed(metrics(here / "p"))[-1]


def test_a_finished_run_leaves_a_line_and_study_makes_the_table(here):
    for seed, rate in ((1, 1e-3), (2, 1e-3), (1, 3e-3)):
        ok(
            "train.py",
            "small.toml",
            "--max_steps=2",
            f"--seed={seed}",
            f"--learning_rate={rate}",
            "--results=r/lines.jsonl",
            f"--out_dir=o{seed}{rate}",
            cwd=here,
        )
    lines = [json.loads(line) for line in (here / "r" / "lines.jsonl").read_text().splitlines()]
    assert lines[0]["config"] == lines[1]["config"] != lines[2]["config"] and lines[0]["tokens"] == 2 * 256
    for line in lines:
        assert line["best_loss"] == min(record["loss"] for record in metrics(here / line["run"]) if record["split"] == "val")
    rows = ok("studies/study.py", "r/lines.jsonl", cwd=here).splitlines()
    losses = [line["best_loss"] for line in lines]
    assert rows[0].startswith("| learning_rate | seeds |") and len(rows) == 4
    assert rows[2].startswith(f"| 0.001 | 2 | {sum(losses[:2]) / 2:.4f} | {max(losses[:2]) - min(losses[:2]):.4f} |")
    (here / "bad.jsonl").write_text('{"run": 1}\n')
    assert "bad.jsonl, line 1" in fails("studies/study.py", "bad.jsonl", cwd=here)
    assert "absent.jsonl" in fails("studies/study.py", "absent.jsonl", cwd=here)


def test_study_makes_rows_of_folders(here):
    """out/NAME/CORPUS/ROW/SEED: the last line of a run counts; a corpus without a row is left open there."""

    def line(corpus, row, seed, loss):
        return (
            json.dumps(
                {
                    "run": f"out/s/{corpus}/{row}/{seed}",
                    "config": row,
                    "data": corpus,
                    "seed": seed,
                    "best_loss": loss,
                    "bits_per_byte": loss / 2,
                    "parameters": 1200,
                    "seconds": 1,
                    "tokens": 1,
                    "settings": {},
                }
            )
            + "\n"
        )

    (here / "s.jsonl").write_text(
        line("a", "tau + gate", 1, 9.0) + line("a", "tau + gate", 1, 2.0) + line("a", "tau + gate", 2, 4.0) + line("b", "dot", 1, 5.0)
    )
    rows = ok("studies/study.py", "s.jsonl", "--rows", "--figure=f.png", cwd=here).splitlines()
    assert rows[2:] == [
        "| tau + gate | 3.0000 (2.0000) | 1.5000 | 1,200 | - | - | - | 2, 0 |",
        "| dot | - | - | - | 5.0000 (0.0000) | 2.5000 | 1,200 | 0, 1 |",
    ]
    assert (here / "f.png").stat().st_size > 5000
    (here / "g.jsonl").write_text((here / "s.jsonl").read_text() + line("a", "dot", 2, 4.5) + line("a", "dot", 3, 0.0))
    rows = ok("studies/study.py", "g.jsonl", "--rows", "--against=dot", cwd=here).splitlines()
    assert rows[2:] == ["| tau + gate | 0.500 (0.500 to 0.500) | 1 | - | 0 |"]
    assert "--against=do:" in fails("studies/study.py", "g.jsonl", "--rows", "--against=do", cwd=here)
    assert "--rows" in fails("studies/study.py", "g.jsonl", "--against=dot", cwd=here)
    assert "f.png" in fails("studies/study.py", "s.jsonl", "--rows", "--figure=f.png", cwd=here)
    for name, other in (("data", '"d"'), ("config", '"c"')):
        mixed = line("a", "dot", 1, 1.0) + line("a", "dot", 2, 1.0).replace(
            f'"{name}": ' + {"data": '"a"', "config": '"dot"'}[name], f'"{name}": {other}'
        )
        (here / "s.jsonl").write_text(mixed)
        assert "out/s/a/dot/2 was trained on another text" in fails("studies/study.py", "s.jsonl", "--rows", cwd=here)
    for good, bad in (
        ('"best_loss": 1.0', '"best_loss": null'),
        ('"best_loss": 1.0', '"best_loss": NaN'),
        ('"best_loss": 1.0', '"best_loss": true'),
        ('"seconds": 1', '"seconds": "1"'),
        ('"seconds": 1', f'"seconds": {10**400}'),
        ('"seconds": 1', '"seconds": 1, "laplacian": {}'),
    ):
        (here / "s.jsonl").write_text(line("a", "dot", 1, 1.0).replace(good, bad))
        assert "s.jsonl, line 1 is damaged" in fails("studies/study.py", "s.jsonl", "--rows", cwd=here)
    (here / "s.jsonl").write_text(line("a", "dot", 1, 1.0).replace('"parameters": 1200, ', ""))
    assert "s.jsonl, line 1 has no 'parameters'" in fails("studies/study.py", "s.jsonl", "--rows", cwd=here)
    (here / "s.jsonl").write_text(line("a", "dot", 1, 1.0) + line("a", "dot", 1, 1.0).replace("out/s", "out/t"))
    assert "out/t/a/dot/1 and out/s/a/dot/1 are the same row" in fails("studies/study.py", "s.jsonl", "--rows", cwd=here)
    (here / "s.jsonl").write_text(line("a", "y", 1, 2.0) + line("a", "x", 1, 1.0) + line("b", "z", 1, 0.5))
    assert [row[2] for row in ok("studies/study.py", "s.jsonl", "--rows", cwd=here).splitlines()[2:]] == ["x", "y", "z"]
    (here / "s.jsonl").write_text(line("a", "b", 1, 1.0).replace("out/s/a/b/1", "out"))
    assert "CORPUS/ROW/SEED" in fails("studies/study.py", "s.jsonl", "--rows", cwd=here)
