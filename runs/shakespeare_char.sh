#!/usr/bin/env bash
# tau against its dot-product twin on Tiny Shakespeare characters, nanoGPT's CPU recipe: about six minutes on two cores.
# Give the text's file, or none to load it through `datasets`. The losses go to results/my_shakespeare_char_*.
[ $# -eq 0 ] || [ -f "$1" ] || { echo "runs/shakespeare_char.sh: $1 is not a file" >&2; exit 2; }
text=${1:+$(realpath "$1")}
. "$(dirname "$(realpath "$0")")/setup.sh"

data=data/shakespeare_char
[ -f $data/meta.json ] || show python data/shakespeare_char/prepare.py ${text:+"$text"}
[ -f $data/laplacian.parquet ] || show python build_laplacian.py --graph=chain --dim=32 --out=$data/laplacian.parquet

for attention in tau dot; do
    show python train.py configs/shakespeare_char_$attention.toml --init_from=auto
    cp out/shakespeare_char_$attention/metrics.jsonl results/my_shakespeare_char_$attention.jsonl
done
show python plot.py out/shakespeare_char_tau out/shakespeare_char_dot --out=results/my_shakespeare_char.png --overwrite
