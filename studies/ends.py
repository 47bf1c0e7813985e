"""Which of four ends is right? Measure finished runs by lm_eval (requirements-export.txt), and make a table of what it found.

    python studies/ends.py out/my_ends/mine/tau/1 --tasks=data/mine --runs=out/my_ends/runs.jsonl --results=results/my_ends.jsonl
    python studies/ends.py results/ends.jsonl

The first exports the run to a folder in its own, measures it in the tasks that data/ends.py has written to DATA_DIR, and adds a line to
RESULTS: the run's line in RUNS, to which train.py added it, with accuracy, questions and held_out_bits_per_byte. runs/ends.sh calls it."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import NUMBER, ROOT, Parser, UserError, append_line, check_lines, run
from export import export
from studies.study import read_results

CHANCE = 0.25


def measured(folder, tasks):
    """{name: number} of an exported model in the tasks "ends" and "held_out" of a corpus's folder."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r {ROOT / 'requirements-export.txt'}") from None

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True},
        tasks=["ends", "held_out"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=16,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    return {
        "accuracy": results["ends"]["acc,none"],
        "questions": results["ends"]["sample_len"],
        "held_out_bits_per_byte": results["held_out"]["bits_per_byte,none"],
    }


def table(records):
    """Markdown, a row for each ROW of runs in folders .../ROW/SEED: mean accuracy, each seed's, and mean bits per byte."""
    rows = {}
    for record in records:
        rows.setdefault(Path(record["run"]).parent.name, {})[record["seed"]] = record
    lines = ["| | accuracy | each seed's | questions | held-out bits per byte |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        found = [row[seed] for seed in sorted(row)]
        accuracies = [record["accuracy"] for record in found]
        bits = statistics.mean(record["held_out_bits_per_byte"] for record in found)
        shown = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        lines.append(f"| {name} | {statistics.mean(accuracies):.3f} | {shown} | {found[0]['questions']:,} | {bits:.3f} |")
    return "\n".join([*lines, f"| chance | {CHANCE:.3f} | | | |"])


def main():
    options = Parser(__doc__)
    options.add_argument("source", type=Path, metavar="OUT_DIR_OR_RESULTS", help="a finished run to measure; or results, for a table")
    options.add_argument("--tasks", type=Path, metavar="DATA_DIR", help="the corpus's folder, where data/ends.py has written the tasks")
    options.add_argument("--runs", type=Path, metavar="FILE.jsonl", help="the file to which train.py has added the run's line")
    options.add_argument("--results", type=Path, metavar="FILE.jsonl", help="the file to add the line to")
    args = options.parse_args()
    if args.source.suffix == ".jsonl":
        options.refuse_given(args, ("tasks", "runs", "results"), "is for a run to measure: leave it out")
        print(table(read_results([args.source], accuracy=NUMBER, questions=int, held_out_bits_per_byte=NUMBER)))
        return
    for name in ("tasks", "runs", "results"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing (--help lists the options)")
    for task in ("ends", "held_out"):
        if not (args.tasks / f"{task}.yaml").exists():
            raise UserError(f"no {task}.yaml in {args.tasks}: make it by `python data/ends.py {args.tasks}`")
    check_lines(args.results)
    lines = [record for record in read_results([args.runs]) if Path(record["run"]) == args.source]
    if not lines:
        raise UserError(f"{args.runs} has no line of the run {args.source}: train it with --results={args.runs}")
    folder = args.source / "exported"
    export(args.source, folder, overwrite=True)
    line = lines[-1] | measured(folder, args.tasks)
    append_line(args.results, line)
    print(f"{args.source}: accuracy {line['accuracy']:.3f}, held-out bits per byte {line['held_out_bits_per_byte']:.3f}")


if __name__ == "__main__":
    run(main)
