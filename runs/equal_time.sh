#!/usr/bin/env bash
# Who is ahead after the same time at a long context? Tau with its switches against dot product with what applies to it, and
# with only what flash attention can take (it takes no decay and no bias), 4,096 tokens a step in one sequence, on a JSONL file
# of yours (the README's figures are of security advisories):
#
#     bash runs/equal_time.sh FILE.jsonl ["1 2 3"]
#
# Twenty minutes each (SECONDS_EACH=1200), in turn, with the machine to itself: three hours for three seeds. Those that are
# finished are left. The losses go to results/equal_time/.
[ $# -ge 1 ] || { echo 'usage: bash runs/equal_time.sh FILE.jsonl ["SEEDS"]' >&2; exit 2; }
[ -f "$1" ] || { echo "runs/equal_time.sh: $1 does not exist" >&2; exit 2; }
text=$(realpath "$1") seeds=${2:-1 2 3}
. "$(dirname "$0")/setup.sh"

data=data/advisories_4096
[ -f $data/meta.json ] || show python data/jsonl/prepare.py "$text" --out_dir=$data --vocab_size=4096 --val_fraction=0.05
[ -f $data/embeddings.npy ] || show python data/embed.py $data --dim=256
[ -f $data/laplacian.parquet ] || show python build_laplacian.py $data/embeddings.npy --out=$data/laplacian.parquet

for seed in $seeds; do for form in tau dot dot_flash; do
    run=results/equal_time/${form}_$seed
    [ -f $run/metrics.jsonl ] && continue
    switches=(--attention=${form%_flash})
    [ $form = dot_flash ] && switches+=(--forget=none --key_bias=False)
    [ $form = tau ] || switches+=(--spectral_filter=False --local_heads=0 --tau_rope=True)
    show timeout --signal=TERM "${SECONDS_EACH:-1200}" python train.py configs/equal_time.toml --data_dir=$data --seed=$seed \
        --out_dir=out/equal_time/${form}_$seed --overwrite=True "${switches[@]}" || [ $? = 124 ]
    mkdir -p $run
    cp out/equal_time/${form}_$seed/metrics.jsonl $run/
done; done
show python plot.py results/equal_time/* --out=results/equal_time.png --overwrite
