#!/usr/bin/env bash
# Which is ahead after the same wall-clock time at a long context? Tau with its switches against dot product with those that apply to
# it (on flash attention, with forget gate and key bias too), one long sequence per step, on Python's standard library or on a JSONL
# file of yours:
#
#     bash runs/equal_time.sh python_code|FILE.jsonl ["1 2 3"]
#     CONTEXT=16384 bash runs/equal_time.sh python_code 1                 instead of 4,096 tokens
#
# Twenty minutes each (SECONDS_EACH=1200), two side by side with one thread each, on a machine that does nothing else: an hour
# for three seeds. FORMS="tau dot dot_recall" adds dot product with recall heads of its own. Finished runs are not repeated, whatever
# SECONDS_EACH was. The losses go to results/my_NAME/, NAME=equal_time_CORPUS_CONTEXT unless it is set.
[ $# -ge 1 ] || { echo 'usage: bash runs/equal_time.sh python_code|FILE.jsonl ["SEEDS"]' >&2; exit 2; }
[ "$1" = python_code ] || [ -f "$1" ] || { echo "runs/equal_time.sh: $1 is not a file" >&2; exit 2; }
own=$1 text= seeds=${2:-1 2 3}
[ "$own" = python_code ] || text=$(realpath "$1")
. "$(dirname "$(realpath "$0")")/setup.sh"
count SECONDS_EACH "${SECONDS_EACH:=1200}"
numbers SEEDS "$seeds"
[[ ${CONTEXT:=4096} =~ ^[1-9][0-9]{0,4}$ ]] && [ $CONTEXT -le 32768 ] ||
    { echo "runs/equal_time.sh: CONTEXT=$CONTEXT must be 1 to 32768 tokens" >&2; exit 2; }
of_dot="--attention=dot --spectral_filter=False --local_heads=0 --tau_rope=True"
forms=$(rows_called "tau|
dot|$of_dot --recall_heads=0
dot_recall|$of_dot" ${FORMS:-tau dot})
[ -z "$text" ] || own=$(corpus_name "$text")
data=data/${own}_4096 name=$(own_name "${NAME:-equal_time_${own}_$CONTEXT}")
interval=$((50 * 4096 / CONTEXT)) iters=$((8 * 4096 / CONTEXT))  # so many tokens between validations, and in each, at any context

if [ -n "$text" ]; then bpe_corpus $data 4096 jsonl "$text"; else bpe_corpus $data 4096 python_code; fi
[ -f $data/embeddings.npy ] || show python data/embed.py $data --dim=256
[ -f $data/laplacian.parquet ] || show python build_laplacian.py $data/embeddings.npy --out=$data/laplacian.parquet

one() {  # SEED "FORM|SETTINGS"
    local form=${2%%|*} settings=${2#*|} run out
    run=results/$name/${form}_$1 out=out/$name/${form}_$1
    [ ! -f $run/metrics.jsonl ] || { echo "$run is there already, and not run again: another NAME runs it anew"; return; }
    OMP_NUM_THREADS=1 timeout --foreground --signal=TERM $SECONDS_EACH python train.py configs/equal_time.toml --data_dir=$data --seed=$1 \
        --block_size=$CONTEXT --eval_interval=$interval --eval_iters=$iters --out_dir=$out --overwrite=True $settings 2>&1 | last_line
    [ ${PIPESTATUS[0]} = 124 ] && [ -f $out/metrics.jsonl ] || { echo "$out: not trained for $SECONDS_EACH seconds" >&2; return 1; }
    mkdir -p $run
    cp $out/metrics.jsonl $run/
}
export data name interval iters SECONDS_EACH CONTEXT
export -f one last_line
for seed in $seeds; do
    while read -r form; do printf '%s\0%s\0' $seed "$form"; done <<< "$forms"
done | xargs -0 -n 2 -P 2 bash -c 'one "$@"' one ||
    { echo "runs/equal_time.sh: runs failed, see above" >&2; exit 1; }
show python plot.py results/$name/* --out="results/$name.png" --overwrite
