"""The build of a Laplacian, 2,000 to 320,272 rows."""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import build_laplacian
from benchmarks.report import WIDTH, in_own_process, resident_mb, write
from data.embeddings import all_rows, opened
from data.laplacian import load_laplacian
from studies.energy import energies

EMBEDDED = (2000, 8000, 32027, 320272)  # rows; the last is the published run's
WITH_ARROWSPACE = (2000, 8000)


def measured_build(embeddings, out):
    """(seconds, MB above what the libraries hold) of build_laplacian.py, in this process."""
    before, seen, done = resident_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            seen.append(resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    sys.argv = ["build_laplacian.py", str(embeddings), f"--out={out}", "--overwrite"]
    begin = time.perf_counter()
    build_laplacian.main()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, max(seen) - before


def measured_arrowspace(embeddings, laplacian):
    """(seconds, rank correlation of its lambdas with our energies) of the arrowspace package; None without it."""
    try:
        from arrowspace import ArrowSpaceBuilder
    except ImportError:
        return None
    from scipy.stats import spearmanr

    x = np.load(embeddings).astype(np.float64)
    begin = time.perf_counter()
    space, _ = ArrowSpaceBuilder.build({"eps": 1.31, "k": 25, "topk": 15, "p": 1.8, "sigma": 0.535}, x)
    return time.perf_counter() - begin, spearmanr(energies(x, load_laplacian(laplacian)), space.lambdas()).statistic


def bench_laplacian(args):
    """The build of a Laplacian from 2,000 to 320,272 rows of 384 features, float32: those of --embeddings, repeated as
    often as needed, or random ones. Beside it, if it is installed, the arrowspace package."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {count: Path(folder) / f"{count}.npy" for count in EMBEDDED}
        source = all_rows(opened(Path(args.embeddings))) if args.embeddings else None
        for count, path in files.items():
            generator = np.random.default_rng(0)
            mixing = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32)
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": (count, WIDTH if source is None else source.shape[1])}
                )
                for first in range(0, count, 10000):
                    n = min(10000, count - first)
                    x = (
                        generator.standard_normal((n, WIDTH), np.float32) @ mixing
                        if source is None
                        else source[np.arange(first, first + n) % len(source)]
                    )
                    x.astype(np.float32).tofile(file)
        found = {count: [] for count in files}
        for _ in range(args.repeats):
            for count, path in files.items():
                found[count].append(in_own_process(measured_build, path, path.with_suffix(".parquet")))
        for count, path in files.items():
            seconds, memory = (statistics.median(values) for values in zip(*found[count]))
            rows.append({"rows": count, "seconds": seconds, "memory_mb": memory, "arrowspace_s": "-", "rank_correlation": "-"})
            if count in WITH_ARROWSPACE:
                theirs = in_own_process(measured_arrowspace, path, path.with_suffix(".parquet"))
                if theirs is None:
                    print("without arrowspace, which is not installed (pip install arrowspace)", file=sys.stderr)
                else:
                    rows[-1] |= {"arrowspace_s": theirs[0], "rank_correlation": theirs[1]}
    write("laplacian", rows, args)
