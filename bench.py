"""Measure: the attention operator, a whole training step, decoding, what the fast implementations cost in accuracy, and the
build of a Laplacian.

    python bench.py attention                     # against flash SDPA, 256 to 65,536 tokens; --device=cuda: on a GPU
    python bench.py train_step --nanogpt=DIR      # the 30M model, and nanoGPT's from a checkout of it
    python bench.py decode                        # the 30M model, a token after 128 to 131,072 others; --device=cuda: batches of 1, 16
    python bench.py context --runs OUT_DIR ...    # the loss up to 8 times the trained context, by cache (runs/context.sh)
    python bench.py matches --runs OUT_DIR ...    # what recall heads attend to
    python bench.py curves                        # 200 steps of the quick start, by every implementation
    python bench.py precision                     # the quick start with lambda in float32 and in bfloat16
    python bench.py laplacian                     # the build of a Laplacian, 2,000 to 320,272 rows
    python bench.py triton                        # what the GPU kernels take of registers and shared memory; needs no GPU

What is compared runs in turn, and medians are reported, because a machine is seldom quiet. Tables and figures go to
results/my_*; those that came with the repository, of the same names without "my_", are never overwritten."""

from importlib import import_module

from common import Parser, UserError, choose_device, run, waiting

BENCHMARKS = {
    "attention": "attention",
    "train_step": "training",
    "decode": "decoding",
    "context": "decoding",
    "matches": "recall",
    "curves": "accuracy",
    "precision": "accuracy",
    "laplacian": "laplacian",
    "triton": "kernels",
}  # the module of each, in benchmarks/


def main():
    options = Parser(__doc__)
    options.add_argument("what", choices=BENCHMARKS, metavar="BENCHMARK", help="what to measure, as above")
    options.add_argument("--repeats", type=int, default=5, help="runs, of which the median (default: %(default)s)")
    options.add_argument(
        "--longest",
        type=int,
        default=131072,
        help="tokens, in attention, train_step and decode; in the first 65,536 at most (default: %(default)s)",
    )
    device = options.add_argument_group("attention, train_step, decode")
    device.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    step = options.add_argument_group("train_step")
    step.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure too")
    step.add_argument("--compile", action="store_true", help="torch.compile every model")
    step.add_argument("--steps", type=int, default=3, help="steps of a run (default: %(default)s)")
    context = options.add_argument_group("context, matches")
    context.add_argument("--runs", nargs="+", metavar="OUT_DIR", help="trained models")
    context.add_argument("--data_dir", metavar="DIR", help="the corpus they were trained on")
    laplacian = options.add_argument_group("laplacian")
    laplacian.add_argument("--embeddings", metavar="FILE.npy", help="rows to repeat (default: random ones)")
    args = options.parse_args()
    if args.device == "cuda" and args.what not in ("attention", "train_step", "decode"):
        raise UserError("--device=cuda is for attention, train_step and decode")
    for name, least in (("longest", 1024), ("repeats", 1), ("steps", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {least}")
    with waiting("importing torch"):
        benchmark = import_module(f"benchmarks.{BENCHMARKS[args.what]}")  # here, so that a mistake above is answered at once
    if args.device == "cuda":
        choose_device(args.device)
    with waiting(f"measuring {args.what}: minutes, up to an hour for all of it"):
        getattr(benchmark, f"bench_{args.what}")(args)


if __name__ == "__main__":
    run(main)
