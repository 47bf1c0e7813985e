"""The registers and shared memory that the GPU kernels take, each with every tile that autotuning may choose; needs no GPU."""

import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.report import write
from common import UserError

SHARED_KB = {80: 163, 90: 227}  # available to a block of threads, by compute capability


FLOAT64 = "temperature decay bias sink lse grad_weight receiver_w source_w scales table_scales".split()
FLOAT32 = (
    "lambda_q lambda_k receiver_x source_x source_one middle factors grad_q grad_k moment weight sums ones table_ones losses "
    "a b y to_a to_b"
).split()
INT32 = "reach receiver_order receiver_start receiver_bin source_order source_start source_before".split()
VALUES = "v source out spread grad dout logits".split()  # of the dtype of the values


def kernel_resources(what):
    """What ptxas says of a kernel. what: its name, (M, N, warps, stages, registers), head size, dtype of the values, whether with decay
    and bias, whether of the backward pass, compute capability. M and N are the tile, whatever the kernel calls its sides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from ops import attention_grid, attention_triton, fused_triton, recurrence_triton

    name, (M, N, warps, stages, registers), width, values, terms, backward, capability = what
    module = next(module for module in (attention_triton, attention_grid, fused_triton, recurrence_triton) if hasattr(module, name))
    kernel = triton.jit(getattr(module, name))
    constants = {
        "D": width,
        "WIDTH": width,
        "PAD": attention_triton.PAD,
        "HALF": values == "fp16",
        "INTERPRET": False,
        "BACKWARD": backward,
        "BLOCK": M,
        "M": M,
        "KB": M,
        "N": N,
        "ROWS": M,
        "ONE": M > fused_triton.BLOCK,
        "CAPPED": True,
        "FAST": values == "bf16",
        "NEEDS_GRAD": True,
    }
    if name in ("sums_kernel", "grid_kernel"):
        constants |= dict.fromkeys(("lse", "spread", "sink") if backward else ("grad_k", "grad_weight", "moment"))
    if module is attention_grid and not backward:
        constants["source_one"] = None
    if module is attention_triton and not terms:
        constants |= dict.fromkeys(("decay", "bias", "reach", "sink"))
    types = {**dict.fromkeys(VALUES, values), **dict.fromkeys(FLOAT32, "fp32"), **dict.fromkeys(FLOAT64, "fp64")}
    types |= {**dict.fromkeys(INT32, "i32"), "targets": "i64", "table": values if backward else "fp32"}
    scalars = {"softcap": "fp32"}
    signature = {p: "constexpr" if p in constants else "*" + types[p] if p in types else scalars.get(p, "i32") for p in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(kernel.arg_names)
        if p not in constants and (p in types or p[-2:] in ("_b", "_h", "_t") or p in ("C", "K", "width"))
    }
    source = ASTSource(kernel, signature, {(i,): constants[p] for i, p in enumerate(kernel.arg_names) if p in constants}, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages, "maxnreg": registers})
    with tempfile.TemporaryDirectory() as folder:
        (ptx := Path(folder) / "kernel.ptx").write_text(compiled.asm["ptx"])
        said = subprocess.run(
            [
                get_ptxas(capability).path,
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name=sm_{capability}{'a' * (capability == 90)}",
                ptx,
                "-o",
                os.devnull,
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    number = lambda pattern: int(re.search(pattern, said)[1])
    return {
        "kernel": name,
        "tile": f"{M} x {N}",
        "warps": warps,
        "stages": stages,
        "head_size": width,
        "values": values,
        "decay_and_bias": terms,
        "backward": backward,
        "capability": capability / 10,
        "registers": number(r"Used (\d+) registers"),
        "shared_kb": compiled.metadata.shared / 2**10,
        "spilled_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    }


def bench_triton(args):
    """Compile every kernel with every tile that autotuning may choose, ahead of time. Raises UserError if one does not fit."""
    try:
        from ops import attention_grid, fused_triton, recurrence_triton
        from ops.attention_triton import KEYS_BLOCK, QUERIES_BLOCK, TILES
    except ImportError as error:
        raise UserError(f"triton needs the package triton: pip install triton==3.9.0 ({error})") from None
    types, both, default = ("bf16", "fp32"), (False, True), (1, 4, 3, None)
    every = [
        ("sums_kernel", tile, width, values, terms, backward, capability)
        for tile in TILES
        for width in (64, 128)
        for values in types
        for terms in both
        for backward in both
        for capability in SHARED_KB
    ]
    every += [
        ("key_kernel", (KEYS_BLOCK, *default), 0, values, terms, False, capability)
        for values in types
        for terms in both
        for capability in SHARED_KB
    ]
    every += [
        ("query_kernel", (QUERIES_BLOCK, *default), width, values, True, True, capability)
        for width in (64, 128)
        for values in types
        for capability in SHARED_KB
    ]
    grid = [("grid_kernel", tile) for tile in attention_grid.TILES] + [("bin_kernel", tile) for tile in attention_grid.TILES]
    grid += [("sum_kernel", (1, *tile, None)) for tile in attention_grid.SUM_TILES]
    every += [
        (name, (M, N, warps, 2, registers), width, values, True, backward, capability)
        for name, (M, N, warps, registers) in grid
        for width in (64, 128)
        for values in types
        for backward in both
        for capability in SHARED_KB
    ]
    every += [
        ("row_kernel", (block, 1, warps, 3, None), 0, values, False, True, capability)
        for block in (fused_triton.BLOCK, fused_triton.MOST)
        for warps in fused_triton.WARPS
        for values in types
        for capability in SHARED_KB
    ]
    every += [
        (name, (recurrence_triton.ROWS, 1, 1, 3, None), width, "fp32", False, name == "recurrence_gradient_kernel", capability)
        for name in ("recurrence_kernel", "recurrence_gradient_kernel")
        for width in (32, 64, 128)
        for capability in SHARED_KB
    ]
    with multiprocessing.get_context("spawn").Pool() as pool:
        rows = list(tqdm(pool.imap(kernel_resources, every), total=len(every), disable=None))
    write("triton_resources", rows, args)
    for row in rows:
        if row["shared_kb"] > SHARED_KB[round(10 * row["capability"])]:
            raise UserError(f"no such device has so much shared memory: {row}")
