"""Compile, without a GPU, exactly the kernels that a call would launch, and read their machine code.

`recorded` runs a wrapper on CPU tensors with the launches caught instead of executed; `compiled` hands one of them to
Triton's compiler with the specialisation a real launch would get (pointers and multiples of 16 aligned, ones constant).
"""
from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CAPABILITIES = (75, 86, 89, 90, 120)
SHARED_LIMIT = {75: 64 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a block may have
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8",
         torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, int]


@dataclass(frozen=True)
class Machine:
    """Machine code of one kernel for one card."""

    instructions: tuple[str, ...]   # text of each, control words and addresses removed
    shared: int
    registers: int
    n_warps: int

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for text in self.instructions)


def recorded(call: Callable[[], object], monkeypatch) -> list[Launch]:
    """The launches of `call`, in order."""
    launches = []

    def catch(self, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", catch)
        call()
    return launches


def compiled(launch: Launch, capability: int) -> Machine:
    """Cubin for sm_<capability>, disassembled."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name], constant = _type(value, parameter.is_constexpr)
        if constant:
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    text = _disassembled(binary.asm["cubin"])
    usage = re.findall(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", binary.asm["cubin"]))
    return Machine(tuple(text), binary.metadata.shared, int(usage[0]), binary.metadata.num_warps)


def _type(value: object, constant: bool) -> tuple[str, bool]:
    if constant or value is None or (value == 1 if isinstance(value, int) else False):
        return "constexpr", True
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype], False
    return ("fp32" if isinstance(value, float) else "i32" if abs(value) < 1 << 31 else "i64"), False


def _tool(name: str, option: str, cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout


def _disassembled(cubin: bytes) -> list[str]:
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*(?:;|&|\?)", _tool("nvdisasm", "-c", cubin))
    return [line for line in lines if not line.startswith(("NOP", "BRA `(.L_x"))]
