"""What the benchmarks share: a process of their own, tables, files."""

import json
import multiprocessing
import sys
from pathlib import Path

import torch

from common import ROOT, commit, replacing

HEADS, HEAD_SIZE = 6, 64
LAYERS, WIDTH, VOCABULARY = 6, 384, 30522  # configs/tau_30m.toml
TOKENS = {"cpu": 4096, "cuda": 32768}  # per batch, unless one sequence has more


def place(name):
    """Where a result goes: never over one that came with the repository."""
    return ROOT / "results" / f"my_{name}"


def in_own_process(function, *args):
    """function(*args) in a fresh process, which does not inherit the memory of what ran before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def resident_mb():
    """Resident memory of this process in MB, without mapped files; Linux only."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**10


def write(name, rows, args):
    """Print a table and write it, with what it was measured on, to results/my_NAME.json."""
    columns = list(rows[0])
    cells = [columns] + [
        [
            f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}" if isinstance(value, float) else str(value)
            for value in row.values()
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells))
    with replacing(place(f"{name}.json")) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                    "commit": commit(),
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    **({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}),
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )
