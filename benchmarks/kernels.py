"""The registers and shared memory that the GPU kernels take; needs no GPU."""

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


def kernel_resources(what):
    """What ptxas says of a kernel. what: its name in attention_triton, tile, head size, dtype of the values, whether with decay and
    bias, whether of the backward pass, compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from ops import attention_triton

    name, (M, N, warps, stages, registers), width, values, terms, backward, capability = what
    kernel = triton.jit(getattr(attention_triton, name))
    constants = {
        "D": width,
        "WIDTH": width,
        "PAD": attention_triton.PAD,
        "HALF": values == "fp16",
        "INTERPRET": False,
        "BACKWARD": backward,
        "BLOCK": M,
        "M": M,
        "N": N,
        "C": M,
        "COLS": N,
    }
    if name != "level_kernel":
        constants |= dict.fromkeys(("lse", "spread") if backward and name == "sums_kernel" else ("grad_k", "grad_weight")) | (
            {} if terms else dict.fromkeys(("decay", "bias", "reach"))
        )
    constants |= {"moment": None} if name == "sums_kernel" and not backward else {}
    types = (
        dict.fromkeys(("v", "source", "out", "spread", "grad", "dout"), values)
        | {"reach": "i32", "order": "i64"}
        | dict.fromkeys(
            ("lambda_q", "lambda_k", "receiver_x", "middle", "factors", "grad_q", "grad_k", "moment", "values", "total", "diff"), "fp32"
        )
        | dict.fromkeys(("temperature", "decay", "bias", "lse", "grad_weight", "x", "w", "scale", "new_scale"), "fp64")
    )
    types["weight"] = "fp64" if name == "level_kernel" else "fp32"
    signature = {
        p: "constexpr" if p in constants else "*" + types[p] if p in types else "fp32" if p == "sign" else "i32" for p in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(kernel.arg_names)
        if p not in constants and (p in types or p[-2:] in ("_b", "_h", "_t"))
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
        from ops.attention_triton import KEYS_BLOCK, LEVEL_TILE, QUERIES_BLOCK, TILES
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
    every += [("level_kernel", (*LEVEL_TILE, None), 0, "fp32", True, True, capability) for capability in SHARED_KB]
    with multiprocessing.get_context("spawn").Pool() as pool:
        rows = list(tqdm(pool.imap(kernel_resources, every), total=len(every), disable=None))
    write("triton_resources", rows, args)
    for row in rows:
        if row["shared_kb"] > SHARED_KB[round(10 * row["capability"])]:
            raise UserError(f"no such device has so much shared memory: {row}")
