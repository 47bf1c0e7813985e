import json
import os
import shutil
import subprocess
import sys

from conftest import ROOT, metrics


def fresh_copy(tmp_path):
    """A checkout in which nothing is made yet, with the packages that are installed here."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".venv",
            ".git",
            "out",
            "*.bin",
            "*.npy",
            "*.parquet",
            "*.jsonl",
            "meta.json",
            "tokenizer.json",
            "laplacian.json",
            "*.npz",
            "__pycache__",
        ),
    )
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


def test_quickstart_and_study_in_a_fresh_copy_then_again(tmp_path):
    """The whole scripts, the trainings cut to 20 and 4 steps, with the packages that are installed here; the quick start with nothing
    else: Python, a shell and a few programs that every system has, no compiler, no git, no home."""
    copy = fresh_copy(tmp_path)
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python3").symlink_to(sys._base_executable)
    for program in ("bash", "sh", "basename", "cat", "dirname", "mkdir", "realpath"):
        (bare / program).symlink_to(shutil.which(program))

    def quickstart():
        done = subprocess.run(
            [
                "bash",
                "runs/quickstart.sh",
                "--max_steps=20",
                "--eval_interval=10",
                "--eval_iters=2",
                "--warmup_steps=5",
                "--lr_decay_steps=20",
            ],
            cwd=copy,
            capture_output=True,
            text=True,
            env={
                "PATH": str(bare),
                "HOME": os.devnull,
                "TMPDIR": os.devnull,
                "TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled"),
                "TQDM_DISABLE": "1",
            },
        )
        assert done.returncode == 0, done.stderr
        said = "".join(line for line in done.stderr.splitlines(keepends=True) if "atplotlib" not in line)  # it has no home for its cache
        assert said == "exact cache: a token reads all before it, for decode.cpp could not be compiled: there is no C++ compiler c++\n"
        return done.stdout

    out = quickstart()
    for command in ("data/python_docs/prepare.py", "data/embed.py", "build_laplacian.py", "train.py", "plot.py", "sample.py", "view.py"):
        assert f"$ python {command} " in out
    assert "out/quickstart/view.html" in out.splitlines()[-2] and (copy / "out/quickstart/view.html").stat().st_size > 100_000
    assert "out/quickstart/figure.png" in out.splitlines()[-1] and (copy / "out/quickstart/figure.png").stat().st_size > 10_000
    losses = [record["loss"] for record in metrics(copy / "out/quickstart") if record["split"] == "val"]
    assert losses[-1] < losses[0] - 0.5

    again = quickstart()
    assert "prepare.py" not in again and "nothing to do" in again

    def study(*rows, **settings):
        return subprocess.run(
            ["bash", "runs/study.sh", "README.md", *rows],
            cwd=copy,
            capture_output=True,
            text=True,
            env=os.environ | dict(CORPORA="python_docs", SEEDS="1", WORKERS="1") | settings,
        )

    config = copy / "configs/study.toml"
    config.write_text(config.read_text().replace("max_steps = 600", "max_steps = 4").replace("eval_iters = ", "eval_iters = 1 #"))
    results = copy / "results/my_study.jsonl"
    assert "no row" in study("tau + luck").stderr and not results.exists()
    shutil.copy(copy / "README.md", copy / "python_docs.jsonl")
    taken = subprocess.run(["bash", "runs/domain.sh", "python_docs.jsonl"], cwd=copy, capture_output=True, text=True)
    assert taken.returncode == 2 and "rename the file" in taken.stderr and len(taken.stderr.splitlines()) == 1
    mine = copy / "mine.jsonl"
    mine.write_text("".join(f'{{"text": "record {i} of a text of mine"}}\n' for i in range(200)))
    subprocess.run([sys.executable, "data/jsonl/prepare.py", mine, "--out_dir=data/mine", "--tokenizer=char"], cwd=copy, check=True)
    taken = subprocess.run(["bash", "runs/context.sh", "mine.jsonl"], cwd=copy, capture_output=True, text=True)
    assert taken.returncode == 2 and "context.sh: error: data/mine is not " in taken.stderr
    assert len(taken.stderr.splitlines()) == 1
    done = study("dot", "tau + gate")
    assert done.returncode == 0, done.stderr
    whole = results.read_text()
    runs = [json.loads(line) for line in whole.splitlines()]
    assert [(run["run"], run["steps"]) for run in runs] == [(f"out/my_study/python_docs/{row}/1", 4) for row in ("dot", "tau + gate")]
    assert done.stdout.count("best validation loss") == 2 and f"| tau + gate | {runs[1]['best_loss']:.4f} (0.0000) |" in done.stdout
    results.write_text(whole[:-9])  # the writer was killed
    shutil.rmtree(copy / "out/my_study/python_docs/tau + gate")
    assert study("dot", "tau + gate").stdout.count("best validation loss") == 1
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(run["run"], run["best_loss"]) for run in again] == [(run["run"], run["best_loss"]) for run in runs]
    taken = study("dot", SEEDS="1 x")
    assert taken.returncode == 2 and taken.stderr == 'runs/study.sh: SEEDS="1 x" must be whole numbers\n'
    for workers in ("0", "1 2"):
        taken = study("dot", WORKERS=workers)
        assert (taken.returncode, taken.stderr) == (2, f'runs/study.sh: WORKERS="{workers}" must be one whole number above 0\n')
    config.write_text(config.read_text().replace("max_steps = 4", "max_steps = -4"))
    failed = study("dot", SEEDS="2")
    assert failed.returncode == 1 and "out/my_study/python_docs/dot/2: failed" in failed.stderr and "max_steps" in failed.stdout


def test_own_text(tmp_path):
    copy = fresh_copy(tmp_path)
    (copy / "mine.jsonl").write_text("".join(f'{{"text": "record {i} of a text of mine"}}\n' for i in range(200)))

    def own_text(*args, stdin=None, **settings):
        done = subprocess.run(
            ["bash", "runs/own_text.sh", *args], cwd=copy, capture_output=True, text=True, input=stdin, env=os.environ | settings
        )
        return done.returncode, done.stdout, done.stderr.splitlines()[-1:]

    status, out, said = own_text("mine.jsonl", "--max_steps", "2", "--eval-iters=1", "--val_fraction=0.2")
    assert status == 0, said
    assert "features=16 " not in out and "max_steps=2 " in out and " --vocab_size=320 --val_fraction=0.2\n" in out
    assert (copy / "out/my_mine/figure.png").exists() and metrics(copy / "out/my_mine")[-1]["step"] == 2
    assert "$ python sample.py out/my_mine " in out and out.endswith("more: python sample.py out/my_mine --prompt=TEXT\n")
    (copy / "folder").mkdir()
    (copy / "folder/a.txt").write_text((copy / "README.md").read_text())
    (copy / "folder/.#a.txt").symlink_to("me@host.1")  # as an editor leaves it
    status, out, said = own_text("folder", "--dry_run", "--split_on=\\n", "--n_layer=1")
    assert status == 0 and "parameters " in out, said
    piped = "".join(f"A paragraph, number {i}.\n\n" for i in range(900))
    status, out, said = own_text("-", "--dry_run", "--laplacian=data/my_mine/laplacian.parquet", stdin=piped, NAME="piped")
    assert status == 0 and "data/my_piped/piped_0 --out_dir=data/my_piped" in out and "parameters " in out, said
    assert "build_laplacian.py" not in out
    status, out, said = own_text("-", stdin="another text", NAME="piped")
    assert status == 2 and "data/my_piped/piped_0 is the copy of another pipe: give NAME=ANOTHER" in said[0]
    assert (copy / "data/my_piped/piped_0").read_text() == piped
    assert not (copy / "out/my_piped").exists()
    status, out, said = own_text("--help")
    assert status == 0 and "OWNER/NAME of a data set" in out and "--text_key NAME" in out and "--max_steps INT" in out
    for args, settings, expected in (
        (
            ["README.md"],
            {"NAME": "mine"},
            "data/my_mine/meta.json was made otherwise, of another input or with other options: give NAME",
        ),
        (["README.md"], {"NAME": "a b"}, "NAME=a b must be letters"),
        (["absent"], {}, "absent is no file or folder"),
        (["--out_dir=x", "README.md"], {}, "--out_dir cannot be given"),
        (["README.md", "--vocab_size=5"], {}, "--vocab_size=5 must be 257"),
        (["/dev/null"], {"NAME": "nothing"}, "the corpus is empty"),
        (["README.md", "--vocab_size=300", "--tokenizer=char"], {}, "--vocab_size=300 is for a tokenizer that is made"),
        (["README.md", "--splt_on=x"], {}, "did you mean --split_on?"),
        (["README.md", "--max_steps=many"], {}, "--max_steps=many must be int"),
        (["README.md", "--attention=dot"], {}, "give spectral_filter=False"),
        (["README.md", "--n_head", "3"], {}, "n_embd=128 must be n_head=3"),
        (["README.md", "--min_lr=1"], {}, "min_lr = 1.0 is above learning_rate"),
        (["README.md", "--init_from=absent"], {}, "'absent' is no folder of a run"),
        (["-"], {}, "standard input has no name: NAME=..."),
        (["absent/file.txt"], {}, "absent/file.txt is no file or folder"),
        ([], {}, "FILE_OR_FOLDER is missing"),
    ):
        status, _, said = own_text(*args, **settings)
        assert status == 2 and expected in said[0], said
    assert {path.name for path in (copy / "data").glob("my_*")} == {"my_mine", "my_piped", "my_folder"}
