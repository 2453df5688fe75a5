"""Compiles kernels for a GPU that need not be there and prints what became of them, as JSON. Run without interpreter.

The interpreter takes Python that the compiler refuses, and knows nothing of contraction; this is the other half.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from worker.engine.kernels.cuda import (
    collect,
    count_equal,
    elected_balance,
    equals,
    form,
    histogram,
    kept_l1,
    merge,
    operands,
)

PRODUCTS, DIFFERENCES, MIXED = operands.PRODUCT.value, operands.DIFFERENCE.value, operands.MIXED.value
TYPES = {
    "table": "*i64",
    "counts": "*i64",
    "count": "*i64",
    "balance": "*i64",
    "copies": "*i32",
    "found": "*i32",
    "divided": "*i32",
    "partials": "*fp64",
    "base": "*i16",
    "out": "*i16",
} | dict.fromkeys(("base_factor", "scale", "divisor", "zero_sign", "overflow"), "fp32")


def main() -> None:
    found = {}
    for name, kernel, kind, further in kernels():
        for capability in (80, 90):
            found[f"{name}, sm_{capability}"] = compiled(kernel, kind, capability, further)
    json.dump(found, sys.stdout)


def kernels() -> list[tuple[str, Any, int, dict[str, Any]]]:
    """A name, the kernel, the kind of its operands, and what it is compiled for beyond them."""
    vote = {"ELECTION": 1, "WEIGH": True, "DIVIDED": True, "RESCALED": True, "TYPES": {"count": "i32"}}
    merging = vote | {"DIVISOR": 1, "BASE": 2, "OUT": 2}
    bins = {"COPIES": 16, "BINS": 1 << 15, "FINE": False}
    chunks = {"STEP": 1024, "WIDTH": 1024, "TYPES": {"counts": "*i32"}}
    return [
        ("form of products", form._form, PRODUCTS, {"TYPES": {"out": "*fp32"}}),
        ("form of any kind", form._form, MIXED, {"TYPES": {"out": "*fp32"}}),
        ("histogram", histogram._histogram, PRODUCTS, bins),
        ("collect", collect._collect, PRODUCTS, {}),
        ("count_equal", count_equal._count_equal, DIFFERENCES, {}),
        ("kept_l1", kept_l1._kept_l1, PRODUCTS, {"DIVIDED": True}),
        ("equals, counted", equals._count, DIFFERENCES, chunks),
        ("equals, found", equals._find, PRODUCTS, chunks),
        ("elected_balance", elected_balance._elected_balance, PRODUCTS, vote),
        ("merge of four adapters", merge._merge, PRODUCTS, merging | {"HELD": 4}),
        ("merge of four models", merge._merge, DIFFERENCES, merging | {"HELD": 4, "ORIGIN": operands.GIVEN.value}),
        ("merge of many", merge._merge, MIXED, merging | {"HELD": 0}),
    ]


def compiled(kernel: Any, kind: int, capability: int, further: dict[str, Any]) -> dict[str, Any]:
    height, width = (4, 512) if kind != DIFFERENCES else (1, 2048)
    constants: dict[str, Any] = {
        "OPERANDS": kind,
        "OWN": 2,
        "ORIGIN": 2,
        "SCALED": True,
        "ALIGNED": True,
        "HEIGHT": height,
        "WIDTH": width,
        "EVEN": False,
    } | further
    types = TYPES | constants.pop("TYPES", {})
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(
        kernel,
        signature,
        {(place,): constants[name] for place, name in enumerate(names) if name in constants},
        divisible,
    )
    options = {"enable_fp_fusion": False, "num_warps": operands.WARPS}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "contracted": len(re.findall(r"\bfma\.", ptx)),
        "flushed": ptx.count(".ftz"),
        "binary": len(made.asm["cubin"]),
        "fusion": made.metadata.enable_fp_fusion,
    }


if __name__ == "__main__":
    main()
