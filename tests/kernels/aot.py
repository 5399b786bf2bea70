"""Compiles the Triton kernels ahead of time, without a GPU, and reads back what the compiler made of them.

`python -m tests.kernels.aot` prints the table of docs/evidence/kernels_gpu.md. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "bf16", "fp16")
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What a launch finds out about its arguments: these are multiples of 16 when rows are aligned.
ALIGNED = ("student", "teacher", "labels", "out", "scalars", "student_stride", "teacher_stride", "columns")


@dataclass(frozen=True)
class Variant:
    kernel: str
    dtype: str  # of both models' logits
    divergence: str = "jsd"
    unscaled: bool = False
    best: bool = False

    @property
    def models(self) -> int:
        return 1 if self.divergence == "none" else 2

    @property
    def block(self) -> int:
        from minitron_nemo.kernels import triton_rows

        return triton_rows.BLOCK if self.kernel == "gradients" else triton_rows.ROW_BLOCK

    @property
    def vectors(self) -> int:
        """128-bit accesses in which a thread reads or writes its share of one model's block."""
        return self.block * ITEM_BYTES[self.dtype] // (16 * 32 * 8)


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int  # bytes; more than 0 means spilled registers
    vector_loads: int
    vector_stores: int
    exponentials: int
    barriers_in_loops: int


def variants(dtypes: tuple[str, ...] = DTYPES) -> list[Variant]:
    """Every combination that the launches in triton_rows can ask for; the best ids are asked for at one of them."""
    divergences = ("none", "forward_kl", "reverse_kl", "jsd")
    found: list[Variant] = []
    for dtype in dtypes:
        for kernel, divergence, unscaled in itertools.product(("statistics", "gradients"), divergences, (False, True)):
            found.append(Variant(kernel, dtype, divergence, unscaled))
        found.append(Variant("statistics", dtype, "forward_kl", best=True))
        found.append(Variant("mixture", dtype))
    return found


def compiled(variant: Variant, architecture: int, aligned: tuple[str, ...] = ALIGNED) -> Compiled:
    """`variant` for sm_<architecture>, with the arguments in `aligned` known to be multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minitron_nemo.kernels import triton_kernels, triton_rows

    function = getattr(triton_kernels, f"{variant.kernel}_kernel")
    constants: dict[str, Any] = {"BLOCK": variant.block}
    if variant.kernel != "mixture":
        constants |= {"DIVERGENCE": variant.divergence, "UNSCALED": variant.unscaled}
    if variant.kernel == "statistics":
        constants["BEST"] = variant.best
    if variant.divergence == "none":
        constants["teacher"] = None
    types = {
        "student": f"*{variant.dtype}",
        "teacher": f"*{variant.dtype}",
        "labels": "*i64",
        "scalars": "*fp32",
        "out": "*fp64",
        "temperature": "fp32",
        "inverse_temperature": "fp32",
        "beta": "fp32",
    }
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if name in aligned and name not in constants
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=triton_rows.OPTIONS)
    registers, stack = _resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return Compiled(
        registers,
        stack,
        vector_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        vector_stores=len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        exponentials=len(re.findall(r"\bex2\.", ptx)),
        barriers_in_loops=sum(len(re.findall(r"\bbar\S*\.sync", body)) for body in _loops(ptx)),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes, by the cuobjdump that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise ValueError(f"cuobjdump said nothing of registers: {report}")
    return int(found[1]), int(found[2])


def _loops(ptx: str) -> list[str]:
    """What lies between a label and a later branch back to it."""
    bodies = []
    for label in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE):
        rest = ptx[label.end() :]
        branches = list(re.finditer(rf"bra(\.uni)?\s+{re.escape(label[1])};", rest))
        if branches:
            bodies.append(rest[: branches[-1].start()])
    return bodies


def _table() -> None:
    sms = ", ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    print(f"| kernel | divergence | variant | logits | registers on {sms} | stack | v4 loads | v4 stores | ex2 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for variant in variants():
        results = [compiled(variant, architecture) for architecture in ARCHITECTURES]
        extra = "own exponentials at T = 1" if variant.unscaled else "best ids" if variant.best else ""
        columns = [
            ", ".join(str(getattr(result, field)) for result in results)
            for field in ("registers", "stack", "vector_loads", "vector_stores", "exponentials")
        ]
        for index, column in enumerate(columns):
            if len(set(column.split(", "))) == 1:
                columns[index] = column.split(", ")[0]
        print("|", " | ".join([variant.kernel, variant.divergence, extra, variant.dtype, *columns]), "|")


if __name__ == "__main__":
    _table()
