#!/usr/bin/env bash
# Style and the test suite. Tests on real data read the folder that TAUFORMER_DATA names, and are skipped without it.
. "$(dirname "$(realpath "$0")")/setup.sh"
python -m pip install --quiet --disable-pip-version-check pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17 ruff==0.17.6
[ "$(uname)" = Darwin ] || python -c "import triton" 2> /dev/null || python -m pip install --quiet --disable-pip-version-check triton==3.9.0
require requirements-export.txt ||
    echo "requirements-export.txt could not be installed: tests that need it are skipped" >&2
ruff check --quiet .
ruff format --check --quiet . || { echo "style: run ruff format" >&2; exit 1; }
OMP_NUM_THREADS=1 python -m pytest -n 2 --maxschedchunk 1 tests "$@"
