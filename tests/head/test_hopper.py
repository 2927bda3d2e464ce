"""The Triton kernels compile for Hopper, as they are meant to; that needs Triton but no GPU."""

import os
import subprocess
import sys
from typing import Any

import pytest

# Every kernel in fp32, with bf16 tiles; the divergence with the most arithmetic.
CONSTANTS: dict[str, Any] = {  # numbers of several types
    "LOWEST": -1e37,
    "WITH_ENTROPY": True,
    "KIND": 2,
    "BETA": 0.5,
}
KERNELS = ("statistics", "softmax", "divergence_values", "divergence_tile")


def print_assembly(name: str) -> None:
    """Compile one kernel as at a launch with aligned rows, in a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megadistill.head import triton_kernels
    from megadistill.head.triton_rows import MOST_COLUMNS, NUM_WARPS

    kernel = getattr(triton_kernels, f"{name}_kernel")
    constants = {"BLOCK": MOST_COLUMNS} | CONSTANTS
    signature = {
        argument: "constexpr"
        if argument in constants
        else ("*bf16" if argument == "tile_ptr" else "*fp32" if "ptr" in argument else "i32")
        for argument in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind != "constexpr"
    }
    used = {
        argument: constants[argument] for argument, kind in signature.items() if kind == "constexpr"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS}
    )
    assert compiled.asm["cubin"]
    sys.stdout.write(compiled.asm["ptx"])


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_to_wide_reads_and_a_barrier(name: str) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.head.test_hopper", name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "ld.global.v4" in result.stdout
    # A tile lies in the memory of its logits: a barrier keeps a block's reads before its writes.
    assert "bar.sync" in result.stdout


if __name__ == "__main__":
    print_assembly(sys.argv[1])
