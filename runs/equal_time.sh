#!/usr/bin/env bash
# Which is ahead after the same wall-clock time at a long context? Tau with its switches against dot product with those that apply to
# it (on flash attention, with forget gate and key bias too), one sequence of 4,096 tokens per step, on a JSONL file of yours (the
# figures of docs/quality.md are of security advisories):
#
#     bash runs/equal_time.sh FILE.jsonl ["1 2 3"]
#
# Twenty minutes each (SECONDS_EACH=1200), the two side by side with one thread each, on a machine that does nothing else: an hour
# for three seeds. Finished runs are not repeated. The losses go to results/my_NAME/, NAME=equal_time_FILE unless it is set
# (those of docs/quality.md are in results/equal_time/).
[ $# -ge 1 ] || { echo 'usage: bash runs/equal_time.sh FILE.jsonl ["SEEDS"]' >&2; exit 2; }
[ -f "$1" ] || { echo "runs/equal_time.sh: $1 is not a file" >&2; exit 2; }
text=$(realpath "$1") seeds=${2:-1 2 3}
. "$(dirname "$(realpath "$0")")/setup.sh"
numbers SECONDS_EACH "${SECONDS_EACH:=1200}"
numbers SEEDS "$seeds"
own=$(corpus_name "$text")
data=data/${own}_4096 name=$(own_name "${NAME:-equal_time_$own}")

bpe_corpus $data 4096 jsonl "$text"
[ -f $data/embeddings.npy ] || show python data/embed.py $data --dim=256
[ -f $data/laplacian.parquet ] || show python build_laplacian.py $data/embeddings.npy --out=$data/laplacian.parquet

one() {  # FORM SEED
    local run=results/$name/$1_$2 out=out/$name/$1_$2 switches=(--attention=$1)
    [ -f $run/metrics.jsonl ] && return
    [ $1 = dot ] && switches+=(--spectral_filter=False --local_heads=0 --tau_rope=True)
    OMP_NUM_THREADS=1 timeout --foreground --signal=TERM $SECONDS_EACH python train.py configs/equal_time.toml --data_dir=$data --seed=$2 \
        --out_dir=$out --overwrite=True "${switches[@]}" 2>&1 | last_line
    [ ${PIPESTATUS[0]} = 124 ] && [ -f $out/metrics.jsonl ] || { echo "$out: not trained for $SECONDS_EACH seconds" >&2; return 1; }
    mkdir -p $run
    cp $out/metrics.jsonl $run/
}
export data name SECONDS_EACH
export -f one last_line
for seed in $seeds; do printf '%s\n' "tau $seed" "dot $seed"; done | xargs -L 1 -P 2 bash -c 'one "$@"' one ||
    { echo "runs/equal_time.sh: runs failed, see above" >&2; exit 1; }
show python plot.py results/$name/* --out="results/$name.png" --overwrite
