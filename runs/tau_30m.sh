#!/usr/bin/env bash
# The published 30M run, from a text to a figure and samples:
#
#     bash runs/tau_30m.sh CORPUS [--key=value ...]
#
# CORPUS is a release of the CVE list (github.com/CVEProject/cvelistV5, "all CVEs at midnight"; folder or zip) or a JSONL file, plain
# or compressed. Options go to train.py. LAPLACIAN=FILE takes that one (the author's, say) and embeds nothing; else the embeddings are
# all-MiniLM-L6-v2's where sentence-transformers is installed and has the model or a network, and LSA's where not. DATA=data/cve is
# where corpus, embeddings and Laplacian go, GPUS=1 how many to use (1, 2, 4 or 8), MODELS=tau_30m the configs to train ("tau_30m
# dot_30m": the twin too). What is there already, of the same inputs, is left; what was interrupted goes on.
[ $# -ge 1 ] || { echo "usage: bash runs/tau_30m.sh CORPUS [--key=value ...]" >&2; exit 2; }
[ -e "$1" ] || { echo "runs/tau_30m.sh: $1 does not exist" >&2; exit 2; }
[ -z "${LAPLACIAN:-}" ] || [ -f "$LAPLACIAN" ] || { echo "runs/tau_30m.sh: LAPLACIAN=$LAPLACIAN is not a file" >&2; exit 2; }
case " $* " in *" --out_dir"* | *" --out-dir"*) echo "runs/tau_30m.sh: --out_dir cannot be given: each model has its own, out/MODEL" >&2; exit 2 ;; esac
for model in ${MODELS:=tau_30m}; do
    [ -f "$(dirname "$(realpath "$0")")/../configs/$model.toml" ] || { echo "runs/tau_30m.sh: MODELS=\"$MODELS\": there is no configs/$model.toml" >&2; exit 2; }
done
corpus=$(realpath "$1") laplacian=${LAPLACIAN:+$(realpath "$LAPLACIAN")} data=${DATA:-data/cve}
shift
. "$(dirname "$(realpath "$0")")/setup.sh"
[[ ${GPUS:=1} =~ ^[1248]$ ]] || { echo "$0: GPUS=$GPUS must be 1, 2, 4 or 8" >&2; exit 2; }

embed() {  # with the published model; without it, LSA
    local status=0
    show python data/embed.py "$data" --model=all-MiniLM-L6-v2 "$@" || status=$?
    [ $status -eq 2 ] || return $status
    echo "so the features are those of latent semantic analysis, which needs no model"
    show python data/embed.py "$data" "$@"
}

form=jsonl
if [ -d "$corpus" ] || [ "$(head -c 2 "$corpus")" = PK ]; then form=cve; fi
made "$data/meta.json" "$corpus" -- show python data/$form/prepare.py "$corpus" --out_dir="$data"
if [ -z "$laplacian" ]; then
    laplacian=$data/laplacian.parquet
    made "$data/embeddings.npy" "$data/meta.json" -- embed
    made "$laplacian" "$data/embeddings.npy" -- show python build_laplacian.py "$data/embeddings.npy" --out="$laplacian"
fi

launch=python
[ "$GPUS" -eq 1 ] || launch="torchrun --standalone --nproc_per_node=$GPUS"  # 8 batches of 16 sequences a step, shared out
for model in $MODELS; do
    out=out/$model
    timed show $launch train.py configs/$model.toml --init_from=auto --data_dir="$data" --laplacian="$laplacian" "$@"
    [ -f $out/metrics.jsonl ] || continue  # --dry_run
    [ $out/figure.png -nt $out/metrics.jsonl ] || timed show python plot.py $out results/published_30m --out=$out/figure.png --max_loss=6 --overwrite
    if [ ! $out/samples.txt -nt $out/best.safetensors ]; then
        timed show python sample.py $out --prompt="CVE-2026-" --max_new_tokens=120 --num_samples=3 --seed=1 | tee $out/samples.part
        mv $out/samples.part $out/samples.txt
    fi
done
echo
for model in $MODELS; do
    [ ! -f out/$model/figure.png ] || echo "losses beside the published ones: out/$model/figure.png; samples: out/$model/samples.txt"
done
