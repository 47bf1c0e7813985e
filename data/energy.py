"""Runs studies/energy.py from the path where it used to be."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "studies" / "energy.py"), run_name="__main__")
