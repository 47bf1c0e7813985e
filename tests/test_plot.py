import pytest
from conftest import fails, ok
from matplotlib.image import imread


@pytest.mark.parametrize("args, panels", [(["out/small"], 5), (["out/small", "out/dot"], 5), (["docs/laplacian.parquet"], 2)])
def test_figures(work, tmp_path, args, panels):
    if "out/dot" in args:
        ok("train.py", "small.toml", "--attention=dot", "--max_steps=2", f"--out_dir={tmp_path}/dot", cwd=work)
        args = ["out/small", f"{tmp_path}/dot"]
    assert str(tmp_path / "f.png") in ok("plot.py", *args, f"--out={tmp_path}/f.png", cwd=work)
    image = imread(tmp_path / "f.png")
    assert image.shape[1] > 500 * min(panels, 3) and image.std() > 0.05


@pytest.mark.parametrize(
    "args, expected",
    [
        (["nowhere"], "nowhere"),
        (["docs/laplacian.parquet"], "--out"),
        (["out/small", "--out={tmp}/f.jpg"], ".png"),
        (["out/small", "--out={tmp}/taken.png"], "--overwrite"),
        (["{tmp}/torn"], "line 1 is damaged"),
        (["{tmp}/few"], "damaged"),
        (["{tmp}/word"], "line 1 is damaged (TypeError: elapsed_s is 'x')"),
        (["{tmp}/huge"], "line 1 is damaged (TypeError: tokens is 1000000000000000000000000000000)"),
        (["{tmp}/none"], "no validation loss"),
        (["absent.parquet", "--out={tmp}/f.png"], "absent.parquet does not exist"),
    ],
)
def test_mistakes(work, tmp_path, args, expected):
    (tmp_path / "taken.png").write_bytes(b"mine")
    for name, content in (
        ("torn", '{"step": 0\n{"split": "v'),
        ("few", '{"split": "val"}'),
        ("none", ""),
        ("word", '{"split": "val", "tokens": 1, "loss": 1.0, "elapsed_s": "x"}\n'),
        ("huge", f'{{"split": "val", "tokens": {10**30}, "loss": 1.0}}\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content)
    assert expected in fails("plot.py", *[arg.format(tmp=tmp_path) for arg in args], cwd=work)
    assert (tmp_path / "taken.png").read_bytes() == b"mine"


def test_idea(work, here):
    out = ok("plot.py", work / "out/small", "--idea=the list of names", "--layer=1", "--head=2", "--out=i.png", cwd=here)
    assert "figure: i.png" in out and (here / "i.png").stat().st_size > 10_000
    ok("plot.py", work / "out/small", "--idea=a $^$ of $x", "--out=tex.png", cwd=here)
    for n_head in (0, 3, 32, 1000):
        assert f"--n_head={n_head}" in fails("plot.py", work / "docs/laplacian.parquet", f"--n_head={n_head}", "--out=l.png", cwd=here)
    for options, expected in (
        (["--idea=the list", "--layer=2"], "--layer=2"),
        (["--idea=the list", "--head=4"], "--head=4"),
        (["--idea=a"], "tokens"),
        (["--idea="], "empty"),
        (["--max_loss=nan"], "--max_loss=nan"),
        (["--idea=the list", "--bands"], "one output folder"),
    ):
        assert expected in fails("plot.py", work / "out/small", *options, "--out=j.png", cwd=here)


def test_its_own_figure_is_drawn_again(work, here):
    """A file that something else has put there is not, and neither is one that --out names."""
    run, figure = here / "run", here / "run/figure.png"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 100, "tokens": 1000, "split": "val", "loss": 4.9}\n')
    ok("plot.py", "run", cwd=here)
    (run / "metrics.jsonl").write_text('{"step": 100, "tokens": 1000, "split": "val", "loss": 3.1}\n')
    before = figure.read_bytes()
    ok("plot.py", "run", cwd=here)
    assert figure.read_bytes() != before
    assert "--overwrite" in fails("plot.py", "run", "--out=run/figure.png", cwd=here)
    for other in (b"mine", before.replace(b"tauformer plot.py", b"Matplotlib 3.10.0")):
        figure.write_bytes(other)
        assert "--overwrite" in fails("plot.py", "run", cwd=here)
        assert figure.read_bytes() == other
    ok("plot.py", "run", "--overwrite", cwd=here)


def test_runs_of_which_some_validations_are_known(work, here):
    (here / "known").mkdir()
    (here / "known/metrics.jsonl").write_text('{"step": 100, "tokens": 13107200, "split": "val", "loss": 4.9255}\n')
    ok("plot.py", work / "out/small", "known", "--out=k.png", "--max_loss=5", cwd=here)
