import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, fails, ok, run_script

from common import UserError
from training.checkpoint import RunState, config_of
from training.config import Settings, stored_settings
from training.start import doubts


def said(tokens=1_000_000, documents=(1000, 50), **settings):
    settings = Settings(**settings)
    step = settings.grad_accum_steps * settings.batch_size * settings.block_size
    meta = {"train": {"documents": documents[0]}, "val": {"documents": documents[1]}}
    corpus = SimpleNamespace(meta=meta, train=np.broadcast_to(np.uint16(0), tokens))
    return list(doubts(SimpleNamespace(settings=settings, corpus=corpus, tokens_per_step=step)))


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_raise_no_doubts(config):
    if config.stem != "equal_time":  # which runs until its time is up
        assert not said(tokens=2**36, **tomllib.loads(config.read_text()))
        assert not said(tokens=2**36, documents=(1, 1), **tomllib.loads(config.read_text()))  # one running text


@pytest.mark.parametrize(
    "name, value",
    [("step", "2"), ("step", -1), ("step", True), ("tokens", 10**30), ("best_loss", {"a": 1}), ("elapsed_s", None), ("lr_scale", "half")]
    + [("loss_average", []), ("narrow", {"0.0": "x"}), ("scaler", []), ("wandb_id", 3), ("began", {"laplacian": {}}), ("file", None)],
)
def test_a_run_state_of_wrong_values_is_refused(name, value):
    right = {"step": 2, "best_loss": float("inf"), "loss_average": None, "narrow": {"0.0": 1}, "began": {"laplacian": "x"}}
    assert RunState.of({"run": right | {"of_a_later_version": 1}}, "f").best_loss == float("inf")
    with pytest.raises(UserError, match=f"f is damaged: the {name} of its run is"):
        RunState.of({"run": right | {name: value}}, "f")


def test_settings_of_wrong_values_are_refused():
    assert stored_settings({"run": {}}, "f") == {} and config_of({"config": {"n_embd": 12}}, "f", n_head=2).head_size == 6
    for settings, message in (
        ([], "are"),
        ({"seed": "x"}, "seed = 'x'"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": {}}, "float"),
    ):
        with pytest.raises(UserError, match=message):
            stored_settings({"run": {"settings": settings}}, "f")
    for config in ({"n_embd": "wide"}, {"no_such_field": 1}, {"n_head": None}, {"attention": ["tau"]}):
        with pytest.raises(UserError):
            config_of({"config": config}, "f")


def test_doubts():
    cosine = dict(lr_schedule="cosine", batch_size=1, grad_accum_steps=1, block_size=8, warmup_steps=10, max_steps=100)
    for settings, expected in (
        (dict(cosine, lr_decay_steps=100), ""),
        (dict(cosine, lr_decay_steps=140), ""),
        (dict(cosine, lr_decay_steps=100, documents=(1, 1)), ""),
        (dict(cosine, lr_decay_steps=100, documents=(2, 1)), "validation is on one document of data/python_docs"),
        (dict(cosine, lr_decay_steps=1000), "lr_decay_steps = 1000 is far from max_steps = 100: --lr_decay_steps=100"),
        (dict(cosine, lr_decay_steps=20), "lr_decay_steps = 20 is far from"),
        (dict(cosine, lr_decay_steps=110, warmup_steps=100), "warmup_steps = 100 fills max_steps = 100"),
        (dict(cosine, lr_decay_steps=100, tokens=80), ""),
        (dict(cosine, lr_decay_steps=100, tokens=70), "max_steps = 100 are 11 passes over 70 tokens"),
        (dict(cosine, lr_schedule="plateau", plateau_patience=2, eval_interval=50), "needs more than 2 x 50 steps"),
        (dict(cosine, lr_schedule="plateau", plateau_patience=2, eval_interval=49), ""),
        (dict(cosine, lr_schedule="constant", lr_decay_steps=5, max_steps=0), ""),
    ):
        lines = said(**settings)
        assert len(lines) == bool(expected) and expected in "".join(lines), (settings, lines)


def test_what_was_made_of_another_text_is_refused(here):
    """A corpus that was prepared anew, beside the Laplacian and the token vectors of the old one; files that do not say are taken."""
    (here / "one.jsonl").write_text("".join(f'{{"text": "the {i} th of {i * i} words {"and more " * 9}"}}\n' for i in range(60)))
    (here / "two.jsonl").write_text("".join(f'{{"text": "the {i} th of {i * i} words {"and less " * 9}"}}\n' for i in range(60)))
    prepare = ("data/jsonl/prepare.py", "--out_dir=c", "--vocab_size=270")
    ok(*prepare, "one.jsonl", cwd=here)
    ok("data/embed.py", "c", "--dim=8", cwd=here)
    ok("build_laplacian.py", "c/embeddings.npy", "--out=c/laplacian.parquet", cwd=here)
    train = ("train.py", "small.toml", "--data_dir=c", "--dry_run=True", "--batch_size=1", "--block_size=8")
    ok(*train, cwd=here)
    ok(*prepare, "two.jsonl", "--overwrite", cwd=here)
    said = fails(*train, cwd=here)
    assert "c/laplacian.parquet was made of another text than c holds now: make it again: `python data/embed.py c --dim=32 --ov" in said
    ok(*train, "--laplacian=c/laplacian.parquet", cwd=here)
    domain = ("--embedding_init=domain", "--n_embd=8", "--attention=dot")
    assert "c/token_embeddings.npy was made of another vocabulary" in fails(*train, *domain, cwd=here)
    for beside in ("laplacian", "embeddings"):
        (here / f"c/{beside}.json").unlink()
    ok(*train, cwd=here)
    ok(*train, *domain, cwd=here)


def test_doubts_are_said_on_standard_error_but_for_eval_only(here, work):
    done = run_script("train.py", "small.toml", "--dry_run=True", "--max_steps=5", cwd=here)
    assert done.returncode == 0 and done.stderr.splitlines() == [
        "train.py: warning: warmup_steps = 5 fills max_steps = 5: learning_rate = 0.003 is not reached",
        *(line for line in done.stderr.splitlines() if "plateau rule" in line),
    ]
    done = run_script(
        "train.py", "small.toml", "--eval_only=True", "--max_steps=5", f"--init_from={work / 'out/small'}", "--out_dir=x", cwd=here
    )
    assert done.returncode == 0 and not done.stderr
