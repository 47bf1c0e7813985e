"""200 cases of fuzz.py; results/fuzz.json has 5,000."""

import pytest
from fuzz import fuzz


@pytest.mark.parametrize("first", [0, 100])
def test_changed_files_end_as_they_should(first, tmp_path):
    counts, failures = fuzz(100, tmp_path, first=first)
    assert not failures
    assert sum(sum(codes.values()) for codes in counts.values()) == 100
