#!/usr/bin/env bash
# The main job on a small scale: from text to a trained Tauformer, a sample and a page that shows how it attends, in about six minutes
# on two CPU cores.
# No network is needed once the packages are installed. What exists is used again; an interrupted training run goes on.
# Options are handed on to train.py: bash runs/quickstart.sh --max_steps=100
case " $* " in *" --out_dir"* | *" --out-dir"*) echo "$0: --out_dir cannot be given: the run goes to out/quickstart" >&2; exit 2 ;; esac
. "$(dirname "$(realpath "$0")")/setup.sh"

data=data/python_docs
out=out/quickstart

[ -f $data/meta.json ] || show python data/python_docs/prepare.py --vocab_size=2048 --val_fraction=0.05
[ -f $data/embeddings.npy ] || show python data/embed.py $data --dim=128
[ -f $data/laplacian.parquet ] || show python build_laplacian.py $data/embeddings.npy --out=$data/laplacian.parquet

show python train.py configs/quickstart.toml --init_from=auto "$@"
[ -f $out/metrics.jsonl ] || exit 0  # --dry_run

show python plot.py $out
show python sample.py $out --prompt="Return the" --max_new_tokens=120
echo
show python view.py $out --text="Return the number of items in the list that are equal to the value, or None if the list is empty."
printf '\nwhat each token attends to, what the graph knows, the curves (open it in a browser): %s/view.html\n' "$out"
printf 'losses, energies and Laplacian: %s/figure.png\n' "$out"
