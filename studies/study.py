"""The table of the runs in files of results: a row for each set of settings, mean and spread over its seeds.

    python studies/study.py results/tau_modes.jsonl
    python studies/study.py results/study.jsonl --rows --figure=results/study.png
    python studies/study.py results/study.jsonl --rows --against="tau, published"
    python studies/study.py out/runs.jsonl --list

--rows is for runs in folders .../CORPUS/ROW/SEED, as runs/study.sh has them: a row for each ROW, columns for each CORPUS.
--against tells how much better each row is than a given one, seed by seed. --list is a line for each run, the newest first."""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import NUMBER, Parser, UserError, check_place, read_lines, replacing, run
from training.config import NO_RESULT, Settings

CONTENTS = (  # what a run reads: its field in a line, the table's column, and the settings that say where it is
    ("data", "text", ("data_dir",)),
    ("laplacian", "graph", ("data_dir", "laplacian")),
    ("origin", "began as", ("embedding_init",)),
)
LISTED = 20  # runs of --list


def read_results(paths, **more):
    """The records of the finished runs; of a run with several, the last. more: further fields that they must have, with their types."""
    kinds = dict(run=str, config=str, seed=int, best_loss=NUMBER, seconds=NUMBER, settings=dict)
    kinds |= dict.fromkeys((field for field, _, _ in CONTENTS), str | None) | more  # dot has no Laplacian, an older line not every field
    lines = {}
    for path in paths:
        for _, record in read_lines(path, True, **kinds):
            lines.pop(record["run"], None)  # so that it stands where its last line does
            lines[record["run"]] = record
    return list(lines.values())


def value(settings, name):
    return str(settings.get(name, getattr(Settings, name, "")))


def table(records):
    """Markdown. A row is named by the settings in which the rows differ, and by the contents of what they read where those do not tell
    them apart. Of runs with one seed in one row, which are named on standard error, the last counts."""
    groups = {}
    for record in records:
        groups.setdefault(record["config"], {}).setdefault(record["seed"], []).append(record)
    twice = [" and ".join(run["run"] for run in runs) for group in groups.values() for runs in group.values() if len(runs) > 1]
    if twice:
        print(f"study.py: runs with one seed in one row, of which only the last counts: {'; '.join(twice)}", file=sys.stderr)
    groups = [[runs[-1] for runs in group.values()] for group in groups.values()]
    names, labels = labels_of([group[0] for group in groups])
    lines = [
        "| " + " | ".join([*names, "seeds", "best validation loss", "spread", "seconds a run"]) + " |",
        "| " + "--- | " * (len(names) + 4),
    ]
    for label, group in sorted(zip(labels, groups), key=lambda row: row[0]):
        losses = [record["best_loss"] for record in group]
        numbers = [
            str(len(losses)),
            f"{statistics.mean(losses):.4f}",
            f"{max(losses) - min(losses):.4f}",
            f"{statistics.median(record['seconds'] for record in group):.0f}",
        ]
        lines.append("| " + " | ".join([*label, *numbers]) + " |")
    return "\n".join(lines)


def labels_of(records):
    """(column names, a list of cells for each record) that tell records of different settings or contents apart."""
    shown = [{name: given for name, given in record["settings"].items() if name not in NO_RESULT} for record in records]
    for settings in shown:
        if settings.get("laplacian") == f"{settings.get('data_dir', Settings.data_dir)}/laplacian.parquet":
            del settings["laplacian"]  # the default
    names = [
        name
        for name in dict.fromkeys(name for settings in shown for name in settings)
        if len({value(settings, name) for settings in shown}) > 1
    ]
    labels = [[value(settings, name) for name in names] for settings in shown]
    for field, column, paths in CONTENTS:
        at = [(*(value(settings, path) for path in paths), record.get(field)) for settings, record in zip(shown, records)]
        at = {place for place in at if place[-1] is not None}
        if len(at) > len({place[:-1] for place in at}):
            names.append(column)
            labels = [[*label, str(record.get(field) or "-")] for label, record in zip(labels, records)]
    if len({*map(tuple, labels)}) < len(labels):
        names.append("config")
        labels = [[*label, record["config"]] for label, record in zip(labels, records)]
    return names, labels


def run_list(records, most):
    """A line for each of the newest runs, `most` of them at most; those that do not say their date come last, in the order of the file,
    turned round."""
    records = sorted(reversed(records), key=lambda record: str(record.get("date", "")), reverse=True)
    rows = [("run", "date", "model", "data", "steps", "loss")]
    for record in records[:most]:
        attention, layers, width, data = (value(record["settings"], name) for name in ("attention", "n_layer", "n_embd", "data_dir"))
        rows.append(
            (
                record["run"],
                str(record.get("date", "-")).replace("T", " ").removesuffix("+00:00"),
                f"{attention} {layers} x {width}, {record['parameters'] / 1e6:.2f} M",
                data,
                f"{record['steps']:,}",
                f"{record['best_loss']:.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if len(records) > most:
        lines.append(f"the newest {most} of {len(records):,} runs; --all lists them all")
    return "\n".join(lines)


def by_row(records):
    """{ROW: {CORPUS: {SEED: its record}}} of runs in folders .../CORPUS/ROW/SEED, from the best row to the worst on the first
    corpus; every row has every corpus. Raises UserError for runs that do not belong in one table."""
    rows, texts, configs = {}, {}, {}
    for record in records:
        if len(parts := Path(record["run"]).parts) < 3:
            raise UserError(f"--rows: the run {record['run']!r} is not in a folder CORPUS/ROW/SEED")
        corpus, row = parts[-3:-1]
        if (
            texts.setdefault(corpus, record["data"]) != record["data"]
            or configs.setdefault((corpus, row), record["config"]) != record["config"]
        ):
            raise UserError(
                f"--rows: {record['run']} was trained on another text or with other settings than other runs of {corpus}/{row}: "
                "take one of them out of these files"
            )
        other = rows.setdefault(row, {}).setdefault(corpus, {}).setdefault(record["seed"], record)
        if other is not record:
            raise UserError(
                f"--rows: {record['run']} and {other['run']} are the same row with the same seed: take one of them out of these files"
            )
    first = next(iter(texts))
    rows = {name: {corpus: row.get(corpus, {}) for corpus in texts} for name, row in rows.items()}
    return dict(sorted(rows.items(), key=lambda item: mean_loss(item[1][first])))


def losses_of(runs):
    """The best validation losses of {SEED: record}."""
    return [record["best_loss"] for record in runs.values()]


def mean_loss(runs):
    return statistics.mean(losses_of(runs) or [math.inf])


def corpora_of(rows):
    return list(next(iter(rows.values())))


def row_table(rows):
    """Markdown: mean of the seeds' best validation losses, nats per token, and in brackets their range."""
    corpora = corpora_of(rows)
    lines = [
        "| | " + " | ".join(f"{corpus} | bits a byte | parameters" for corpus in corpora) + " | seeds |",
        "| " + "--- | " * (3 * len(corpora) + 2),
    ]
    for name, row in rows.items():
        cells = []
        for corpus in corpora:
            losses, runs = losses_of(row[corpus]), list(row[corpus].values())
            cells += (
                [
                    f"{mean_loss(row[corpus]):.4f} ({max(losses) - min(losses):.4f})",
                    f"{statistics.mean(record['bits_per_byte'] for record in runs):.4f}",
                    f"{runs[0]['parameters']:,}",
                ]
                if runs
                else ["-"] * 3
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " | " + ", ".join(str(len(runs)) for runs in row.values()) + " |")
    return "\n".join(lines)


def gain_table(rows, against):
    """Markdown: the validation loss of the row `against` minus that of each row, with the same seed: mean, least and greatest."""
    if against not in rows:
        raise UserError(f"--against={against}: no such row; there are: {'; '.join(rows)}")
    corpora = corpora_of(rows)
    lines = [
        f"| better than {against} by | " + " | ".join(f"{corpus} | seeds" for corpus in corpora) + " |",
        "| " + "--- | " * (2 * len(corpora) + 1),
    ]
    for name, row in rows.items():
        cells = []
        for corpus in corpora:
            base = rows[against][corpus]
            gains = [base[seed]["best_loss"] - record["best_loss"] for seed, record in row[corpus].items() if seed in base]
            cells += [f"{statistics.mean(gains):z.3f} ({min(gains):z.3f} to {max(gains):z.3f})" if gains else "-", str(len(gains))]
        if name != against:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_rows(rows, path):
    """A panel per corpus: a point for each seed's loss, a bar for the mean."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    corpora = corpora_of(rows)
    figure, axes = plt.subplots(
        1, len(corpora), figsize=(3 + 3.5 * len(corpora), 1.5 + 0.25 * len(rows)), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, corpus in zip(axes[0], corpora):
        for height, (name, row) in enumerate(rows.items()):
            losses = losses_of(row[corpus])
            color = "C0" if name.startswith("dot") else "C1"
            axis.plot(losses, [height] * len(losses), "o", color=color, markersize=4, alpha=0.6)
            if losses:
                axis.plot(mean_loss(row[corpus]), height, "|", color=color, markersize=14)
        axis.set(title=corpus, xlabel="validation loss, nats a token", yticks=range(len(rows)), yticklabels=rows)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].invert_yaxis()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main():
    options = Parser(__doc__)
    options.add_argument("results", nargs="+", type=Path, metavar="RESULTS.jsonl")
    options.add_argument("--rows", action="store_true", help="name rows and columns by the runs' folders")
    options.add_argument("--against", metavar="ROW", help="with --rows: how much better than this one, in nats")
    options.add_argument("--figure", type=Path, metavar="FILE.png", help="draw such rows")
    options.add_argument("--list", action="store_true", help=f"a line for each run, the newest {LISTED}, in place of the table")
    options.add_argument("--all", action="store_true", help="with --list: all of them")
    options.add_argument("--overwrite", action="store_true", help="replace a figure that is there already")
    args = options.parse_args()
    if not args.rows and (args.against or args.figure):
        raise UserError("--against and --figure are for --rows")
    if args.rows and args.list:
        raise UserError("--rows and --list are two tables: leave one out")
    if args.all and not args.list:
        raise UserError("--all is for --list")
    if args.figure:
        check_place(args.figure, ".png", args.overwrite, "--figure")
    more = dict(bits_per_byte=NUMBER, parameters=int, data=str) if args.rows else dict(parameters=int, steps=int) if args.list else {}
    records = read_results(args.results, **more)
    if not records:
        raise UserError("no finished run in these files")
    if args.list:
        print(run_list(records, len(records) if args.all else LISTED))
        return
    rows = by_row(records) if args.rows else None
    print(table(records) if rows is None else gain_table(rows, args.against) if args.against else row_table(rows))
    if args.figure:
        draw_rows(rows, args.figure)


if __name__ == "__main__":
    run(main)
