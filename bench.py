"""Measure: the attention operator, a whole training step, decoding, what the fast implementations cost in accuracy, and the
build of a Laplacian.

    python bench.py attention                     # against flash SDPA, 256 to 65,536 tokens; --device=cuda: on a GPU
    python bench.py train_step --nanogpt=DIR      # the 30M model, and nanoGPT's from a checkout of it
    python bench.py decode                        # the 30M model, a token after 128 to 131,072 others
    python bench.py context --runs OUT_DIR ...    # the loss up to 8 times the trained context, by cache (runs/context.sh)
    python bench.py curves                        # 200 steps of the quick start, by every implementation
    python bench.py precision                     # the quick start with lambda in float32 and in bfloat16
    python bench.py laplacian                     # the build of a Laplacian, 2,000 to 320,272 rows
    python bench.py triton                        # what the GPU kernels take of registers and shared memory; needs no GPU

What is compared runs in turn, and medians are reported, because a machine is seldom quiet. Tables and figures go to
results/my_*; those that came with the repository, of the same names without "my_", are never overwritten."""

from common import Parser, UserError, run  # isort: skip, for it tells of packages that are missing
import torch

from benchmarks.accuracy import bench_curves, bench_precision
from benchmarks.attention import bench_attention
from benchmarks.decoding import bench_context, bench_decode
from benchmarks.kernels import bench_triton
from benchmarks.laplacian import bench_laplacian
from benchmarks.training import bench_train_step

BENCHMARKS = {
    "attention": bench_attention,
    "train_step": bench_train_step,
    "decode": bench_decode,
    "context": bench_context,
    "curves": bench_curves,
    "precision": bench_precision,
    "laplacian": bench_laplacian,
    "triton": bench_triton,
}


def main():
    options = Parser(__doc__)
    options.add_argument("what", choices=BENCHMARKS)
    options.add_argument("--nanogpt", metavar="DIR", help="train_step: a checkout of nanoGPT to measure too")
    options.add_argument("--embeddings", metavar="FILE.npy", help="laplacian: rows to repeat (default: random ones)")
    options.add_argument("--runs", nargs="+", metavar="OUT_DIR", help="context: trained models")
    options.add_argument("--data_dir", metavar="DIR", help="context: the corpus they were trained on")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="attention, train_step: where (default: %(default)s)")
    options.add_argument("--compile", action="store_true", help="train_step: torch.compile every model")
    options.add_argument("--longest", type=int, default=131072, help="tokens; attention: 65,536 at most (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=5, help="runs, of which the median (default: %(default)s)")
    options.add_argument("--steps", type=int, default=3, help="train_step: steps of a run (default: %(default)s)")
    args = options.parse_args()
    if args.device == "cuda" and args.what not in ("attention", "train_step"):
        raise UserError("--device=cuda is for attention and train_step")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: torch finds no CUDA device")
    for name, least in (("longest", 1024), ("repeats", 1), ("steps", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {least}")
    BENCHMARKS[args.what](args)


if __name__ == "__main__":
    run(main)
