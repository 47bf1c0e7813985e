#!/usr/bin/env bash
# One config over several seeds, and the table of what came out:
#
#     bash runs/sweep.sh NAME CONFIG.toml "1 2 3" [--key=value ...]
#
# The runs go to out/NAME/seed_S, their lines to results/my_NAME.jsonl. Finished runs are not repeated, an interrupted one goes on.
[ $# -ge 3 ] || { echo 'usage: bash runs/sweep.sh NAME CONFIG.toml "SEEDS" [--key=value ...]' >&2; exit 2; }
[ -f "$2" ] || { echo "runs/sweep.sh: $2 is not a file" >&2; exit 2; }
name=$1 config=$(realpath "$2") seeds=$3
shift 3
. "$(dirname "$(realpath "$0")")/setup.sh"
numbers SEEDS "$seeds"
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || { echo "$0: NAME=$name must be letters, digits, dots, dashes and underscores" >&2; exit 2; }
results=results/$(own_name "$name").jsonl

for seed in $seeds; do
    show python train.py "$config" --seed="$seed" --init_from=auto --out_dir="out/$name/seed_$seed" \
        --results="$results" "$@"
done
show python studies/study.py "$results"
