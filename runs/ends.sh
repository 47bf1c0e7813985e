#!/usr/bin/env bash
# Does a small model know how a held-out text ends? Models of the study's size are trained on a JSONL file of yours, the best form of tau
# without recall heads and dot product with the same switches, exported, and asked by the evaluation harness which of four ends is right
# (docs/export.md).
#
#     bash runs/ends.sh FILE.jsonl                     # both forms, three seeds
#     bash runs/ends.sh FILE.jsonl "tau, published"    # these rows only; there are: tau; dot; tau, 4 recall; dot, 4 recall; tau, published
#
# These may be set: SEEDS="1 2 3", WORKERS=2 (runs at a time, with one thread each), QUESTIONS=1000, OPTIONS="--max_steps=900 ..." (for every run;
# give another NAME with them), NAME=ends. Runs go to out/my_NAME/CORPUS/ROW/SEED, a line of each to results/my_NAME.jsonl. Finished runs
# are not repeated, interrupted ones go on; another NAME makes them again.
[ $# -ge 1 ] || { echo 'usage: bash runs/ends.sh FILE.jsonl ["ROW" ...]' >&2; exit 2; }
[ -f "$1" ] || { echo "runs/ends.sh: $1 is not a file" >&2; exit 2; }
jsonl=$(realpath "$1")
shift
. "$(dirname "$(realpath "$0")")/setup.sh"
name=$(own_name "${NAME:-ends}")
numbers SEEDS "${SEEDS:=1 2 3}"
count WORKERS "${WORKERS:=2}"
count QUESTIONS "${QUESTIONS:=1000}"
own=$(corpus_name "$jsonl")
data=data/$own

of_both+=" --n_head=8"
rows="tau|$of_both $of_tau --local_heads=4
dot|--attention=dot $of_both
tau, 4 recall|$of_both $of_tau --local_heads=3 --recall_heads=4
dot, 4 recall|--attention=dot $of_both --recall_heads=4
tau, published|"
[ $# -gt 0 ] || set -- tau dot
chosen=$(rows_called "$rows" "$@")

require requirements-export.txt
bpe_corpus $data 2048 jsonl "$jsonl"
[ -f $data/embeddings.npy ] || show python data/embed.py $data --dim=128
[ -f $data/domain.parquet ] || show python build_laplacian.py $data/embeddings.npy --out=$data/domain.parquet
show python data/ends.py $data --documents=$QUESTIONS --overwrite

one() {  # SEED "ROW|SETTINGS": a run and its line, unless that is there
    local row=${2%%|*} settings=${2#*|} out
    out="out/$name/$own/$row/$1"
    grep -qs "\"run\": \"$out\".*}\$" "results/$name.jsonl" && return
    mkdir -p "$out"
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$out/modules"
    python train.py configs/study.toml --init_from=auto --data_dir=$data --laplacian=$data/domain.parquet --seed=$1 \
        --results="out/$name/runs.jsonl" --out_dir="$out" $settings ${OPTIONS:-} 2>&1 | last_line ||
        { echo "$out: failed" >&2; return 1; }
    python studies/ends.py "$out" --tasks=$data --runs="out/$name/runs.jsonl" --results="results/$name.jsonl" 2> "$out/ends.log" ||
        { tail -3 "$out/ends.log" >&2; echo "$out: failed, see $out/ends.log" >&2; return 1; }
}

export name own data OPTIONS
export -f one last_line
for seed in $SEEDS; do
    while read -r row; do printf '%s\0%s\0' $seed "$row"; done <<< "$chosen"
done | xargs -0 -n 2 -P $WORKERS bash -o pipefail -c 'one "$@"' one || { echo "runs/ends.sh: runs failed, see above" >&2; exit 1; }
show python studies/ends.py "results/$name.jsonl"
