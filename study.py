"""The table of the runs in files of results: a row for each set of settings, mean and spread over its seeds.

    python study.py results/tau_modes.jsonl"""

import statistics
from pathlib import Path

from common import Parser, UserError, read_lines, run
from config import NO_RESULT, Settings


def read_results(paths):
    """The lines of the finished runs; of a run with several lines, the last."""
    lines = {}
    for path in paths:
        for _, record in read_lines(path, "run", "config", "seed", "best_loss", "seconds", "tokens", "settings"):
            lines[record["run"]] = record
    return list(lines.values())


def table(records):
    """Markdown. A row is named by the settings in which the rows differ."""
    value = lambda settings, name: str(settings.get(name, getattr(Settings, name, "")))
    groups = {}
    for record in records:
        groups.setdefault(record["config"], []).append(record)
    shown = [{name: given for name, given in group[0]["settings"].items() if name not in NO_RESULT} for group in groups.values()]
    for settings in shown:
        if settings.get("laplacian") == f"{settings.get('data_dir', Settings.data_dir)}/laplacian.parquet":
            del settings["laplacian"]  # the default
    names = [name for name in dict.fromkeys(name for settings in shown for name in settings)
             if len({value(settings, name) for settings in shown}) > 1]
    rows = ["| " + " | ".join([*names, "seeds", "best validation loss", "spread", "seconds a run"]) + " |",
            "| " + "--- | " * (len(names) + 4)]
    for settings, group in sorted(zip(shown, groups.values()), key=lambda row: [value(row[0], name) for name in names]):
        losses = [record["best_loss"] for record in group]
        rows.append("| " + " | ".join([*(value(settings, name) for name in names), str(len(losses)),
                                       f"{statistics.mean(losses):.4f}", f"{max(losses) - min(losses):.4f}",
                                       f"{statistics.median(record['seconds'] for record in group):.0f}"]) + " |")
    return "\n".join(rows)


def main():
    options = Parser(__doc__)
    options.add_argument("results", nargs="+", type=Path, metavar="RESULTS.jsonl")
    records = read_results(options.parse_args().results)
    if not records:
        raise UserError("no finished run in these files")
    print(table(records))


if __name__ == "__main__":
    run(main)
