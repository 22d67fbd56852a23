"""The kernels compile for GPUs, which takes none: within their shared memory, whatever the sizes.

Launches that fit the blocks of a kernel differ only in numbers, so this holds for memories of any width and size.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from memorizing_transformers_pytorch.kernels import bags, buckets  # noqa: E402

SHARED_BYTES = 99 * 1024  # that a program may use on the smallest of today's GPUs (compute capability 8.6 and 8.9)
TABLES = ["*fp32", "*bf16", "*fp16"]
by_target = pytest.mark.parametrize("capability", [80, 90])


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, object], capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", capability, 32))


@by_target
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ["sum", "product"])
def test_bags_compile(name: str, table: str, capability: int) -> None:
    kernel, numbers, result = {
        "sum": (bags.sum_kernel, "weights", "sums"),
        "product": (bags.product_kernel, "vectors", "products"),
    }[name]
    types = {numbers: "*fp32", "slots": "*i64", "table": table, result: "*fp32"}
    constants = {"ENTRIES": bags.ENTRIES, "COLUMNS": bags.COLUMNS}
    found = compiled(kernel, types, constants, capability)
    assert found.asm["cubin"]
    assert found.metadata.shared <= SHARED_BYTES


@by_target
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_bucket_maxima_compile(precision: str, table: str, capability: int) -> None:
    types = {"queries": "*fp32", "keys": table, "maxima": "*fp32"}
    blocks = {"QUERIES": buckets.QUERIES, "BUCKETS": buckets.BUCKETS, "COLUMNS": buckets.COLUMNS}
    found = compiled(buckets.maxima_kernel, types, {"PRECISION": precision, **blocks}, capability)
    assert found.asm["cubin"]
    assert found.metadata.shared <= SHARED_BYTES
