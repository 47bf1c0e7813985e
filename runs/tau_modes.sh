#!/usr/bin/env bash
# The six strategies for tau on the quick start and on Tiny Shakespeare, three seeds each: 36 runs, about an hour and a
# half on two cores. Needs what runs/quickstart.sh and runs/shakespeare_char.sh prepare. Finished runs are not repeated.
. "$(dirname "$(realpath "$0")")/setup.sh"

for mode in fixed mean percentile adaptive gradient learned; do
    for config in quickstart_published shakespeare_char_tau; do
        for seed in 1 2 3; do
            show python train.py configs/$config.toml --tau_mode=$mode --seed=$seed --init_from=auto \
                --out_dir=out/tau_modes/$config/$mode/$seed --results=results/my_tau_modes.jsonl
        done
    done
done
show python studies/study.py results/my_tau_modes.jsonl
show python plot.py out/tau_modes/quickstart_published/fixed/1 --bands --out=results/my_bands.png --overwrite
