#!/usr/bin/env bash
# From a text of yours to a trained Tauformer, a figure and a sample: minutes on two CPU cores, no network.
#
#     bash runs/own_text.sh FILE_OR_FOLDER ... [--key=value ...]
#
# What is taken, and all options: bash runs/own_text.sh --help (training/own_text.py, which checks them before anything is made).
python=${PYTHON:-python3} setup=$(dirname "$(realpath "$0")")/setup.sh
"$python" -c 'import tomllib' 2> /dev/null || . "$setup"  # which says the Python that is needed
case " $* " in *" --help "* | *" -h "*) exec "$python" "$(dirname "$setup")/../training/own_text.py" --help ;; esac
words=$("$python" "$(dirname "$setup")/../training/own_text.py" "$@") || exit
eval "$words"
. "$setup"

name=$(basename "${paths[0]}")
name=${name%%.*}
name=$(own_name "${NAME:-${name//[^A-Za-z0-9_-]/_}}")
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || { echo "$0: NAME=$NAME must be letters, digits, dots, dashes and underscores" >&2; exit 2; }
data=data/$name out=out/$name elsewhere=NAME=ANOTHER

[ ! -e $data ] || had=yes
ended() {  # STATUS: what a mistake leaves in a folder that this call has made goes, and half a copy
    rm -f $data/piped_*.new
    [ "$1" != 2 ] || [ -n "${had-}" ] || [ -e $data/meta.json ] || rm -f $data/piped_* $data/meta.json.made
    [ -n "${had-}" ] || rmdir $data 2> /dev/null || true
}
trap 'ended $?' EXIT
for at in "${!paths[@]}"; do  # a pipe is read once: its copy is the source
    [ "${paths[at]}" = - ] || [ -e "${paths[at]}" ] && [ ! -f "${paths[at]}" ] && [ ! -d "${paths[at]}" ] || continue
    mkdir -p $data || exit 2
    copy=$PWD/$data/piped_$at
    cat "${paths[at]}" > "$copy.new"
    if [ -f "$copy" ] && [ "$(sha256sum < "$copy")" != "$(sha256sum < "$copy.new")" ]; then
        echo "$0: $data/piped_$at is the copy of another pipe: give NAME=ANOTHER, or remove it" >&2
        exit 2
    fi
    mv "$copy.new" "$copy"
    echo "$data/piped_$at: a copy of ${paths[at]}"
    paths[at]=$copy
done

choose() {  # ARGUMENT ...: sets the sizes that data/sizes.py chooses, and shows them
    local sizes
    sizes=$(python data/sizes.py "$@")
    [ -z "$sizes" ] || printf '\n%s\n' "$sizes"
    eval "$sizes"
}

vocab_size= val_fraction=
choose "${paths[@]}" ${sized[@]+"${sized[@]}"} ${preparing[@]+"${preparing[@]}"}
made $data/meta.json "${paths[@]}" -- show python data/text/prepare.py "${paths[@]}" --out_dir=$data \
    ${vocab_size:+--vocab_size=$vocab_size} ${val_fraction:+--val_fraction=$val_fraction} ${preparing[@]+"${preparing[@]}"}
choose --data_dir=$data ${settings[@]+"${settings[@]}"}
if [[ " ${settings[*]-}" != *" --laplacian="* ]]; then
    graph=(--graph=$graph --dim=$features)
    if [ ${graph[0]} = --graph=domain ]; then
        made $data/embeddings.npy $data/meta.json -- show python data/embed.py $data --dim=$features --documents=20000
        graph=($data/embeddings.npy)
    fi
    made $data/laplacian.parquet $data/meta.json -- show python build_laplacian.py "${graph[@]}" --out=$data/laplacian.parquet
fi
show python train.py configs/own_text.toml --init_from=auto --data_dir=$data --out_dir=$out --n_layer=$n_layer --n_embd=$n_embd \
    --n_head=$n_head --local_heads=$local_heads --recall_heads=$recall_heads --block_size=$block_size --batch_size=$batch_size --max_steps=$max_steps \
    --warmup_steps=$warmup_steps --lr_decay_steps=$lr_decay_steps --eval_interval=$eval_interval ${settings[@]+"${settings[@]}"}
[ -f $out/metrics.jsonl ] || exit 0  # --dry_run
[ $out/figure.png -nt $out/metrics.jsonl ] || show python plot.py $out
show python sample.py $out --max_new_tokens=120
printf '\n\nlosses, energies and Laplacian: %s/figure.png\nmore: python sample.py %s --prompt=TEXT\n' $out $out
