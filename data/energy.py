"""The command of studies/energy.py, where it has always been."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "studies" / "energy.py"), run_name="__main__")
