import pytest
from matplotlib.image import imread

from conftest import fails, ok


@pytest.mark.parametrize("args, panels", [(["out/small"], 5), (["out/small", "out/small"], 5), (["docs/laplacian.parquet"], 2)])
def test_figures(work, tmp_path, args, panels):
    assert str(tmp_path / "f.png") in ok("plot.py", *args, f"--out={tmp_path}/f.png", cwd=work)
    image = imread(tmp_path / "f.png")
    assert image.shape[1] > 500 * min(panels, 3) and image.std() > 0.05


@pytest.mark.parametrize("args, expected", [
    (["nowhere"], "nowhere"), (["docs/laplacian.parquet"], "--out"), (["out/small", "--out={tmp}/f.jpg"], ".png"),
    (["out/small", "--out={tmp}/taken.png"], "--overwrite"), (["{tmp}/torn"], "damaged")])
def test_mistakes(work, tmp_path, args, expected):
    (tmp_path / "taken.png").write_bytes(b"mine")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": 0')
    assert expected in fails("plot.py", *[arg.format(tmp=tmp_path) for arg in args], cwd=work)
    assert (tmp_path / "taken.png").read_bytes() == b"mine"
