#!/usr/bin/env bash
# The published 30M run, from the CVE list's release file to the figure and a sample:
#
#     bash runs/tau_30m.sh CVES.zip [GPUS] [dot]
#
# CVES.zip is a release of github.com/CVEProject/cvelistV5 ("all CVEs at midnight"), GPUS how many of this machine to
# use (default 1). The embedding model is downloaded. The published run took about two hours on one H100; this one has
# not been timed. With `dot` the twin is trained too. What exists is used again; an interrupted training goes on.
[ $# -ge 1 ] || { echo "usage: bash runs/tau_30m.sh CVES.zip [GPUS] [dot]" >&2; exit 2; }
release=$(realpath "$1")
gpus=${2:-1}
twin=${3:-}
. "$(dirname "$0")/setup.sh"

data=data/cve
[ -f $data/meta.json ] || show python data/cve/prepare.py "$release"
if [ ! -f $data/embeddings.npy ]; then
    pip install --quiet --disable-pip-version-check sentence-transformers==6.2.0
    show python data/embed.py $data --model=all-MiniLM-L6-v2
fi
[ -f $data/laplacian.parquet ] || show python build_laplacian.py $data/embeddings.npy --out=$data/laplacian.parquet

for attention in tau $twin; do
    if [ "$gpus" -gt 1 ]; then  # 8 batches of 16 sequences a step, shared out: 1, 2, 4 or 8 GPUS
        show torchrun --standalone --nproc_per_node="$gpus" train.py configs/${attention}_30m.toml --init_from=auto
    else
        show python train.py configs/${attention}_30m.toml --init_from=auto
    fi
done

show python plot.py out/tau_30m ${twin:+out/dot_30m} --overwrite
show python sample.py out/tau_30m --prompt="CVE-2026-" --max_new_tokens=100 --num_samples=3
