"""200 cases of fuzz.py, which runs any number of them."""

from fuzz import fuzz


def test_changed_files_end_as_they_should(tmp_path):
    counts, failures = fuzz(200, tmp_path)
    assert not failures
    assert sum(sum(codes.values()) for codes in counts.values()) == 200
