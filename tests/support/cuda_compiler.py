"""Compiles the launches of our Triton kernels for a GPU that is not here, and reads what they need there.

What is compiled is what is launched: the launchers run on meta tensors, and each launch is noted instead of made. The
Triton wheel brings ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and all that its machine code depends on: hashable, so that equal ones are compiled once."""

    kernel: JITFunction
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def option(self, name: str) -> Any:
        return dict(self.options).get(name)

    def constant(self, name: str) -> Any:
        return dict(self.constants).get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """What a kernel needs. `operations` are the opcodes of its code, in order, without their modifiers.

    `shared_bytes` are those of one program, `stack_bytes` those for which registers do not suffice.
    """

    registers: int
    shared_bytes: int
    stack_bytes: int
    operations: tuple[str, ...]

    def count(self, *names: str) -> int:
        return sum(operation in names for operation in self.operations)

    def before(self, name: str) -> tuple[str, ...]:
        """The operations that come before the first of that name."""
        return self.operations[: self.operations.index(name)]


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Inside, no kernel is launched. The list fills with the launches that would have been."""
    launches: list[Launch] = []

    def getitem(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            launches.append(_launch_of(kernel, args, kwargs, options))

        return note

    with mock.patch.object(JITFunction, "__getitem__", getitem):
        yield launches


def compile_for(launch: Launch, capability: int) -> MachineCode:
    """Machine code for compute capability 80 (A100), 90 (H100, H200), …"""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.types),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        dump = os.path.join(_TOOLS, "cuobjdump")
        told = subprocess.run([dump, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True)
    needs = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout + told.stderr)}
    return MachineCode(
        registers=needs["REG"],
        shared_bytes=built.metadata.shared,
        stack_bytes=needs["STACK"] + needs["LOCAL"],
        operations=tuple(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", told.stdout)),
    )


def _launch_of(kernel: JITFunction, args: tuple[Any, ...], kwargs: Any, options: Any) -> Launch:
    """Specialized as Triton's own launcher does: a 1 and None are constants, and what 16 divides counts as aligned."""
    given = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    types, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        may_specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (may_specialize and type(value) is int and value == 1):
            types.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        if isinstance(value, torch.Tensor):
            types.append((parameter.name, f"*{_TYPES[value.dtype]}"))
            is_aligned = value.storage_offset() * value.itemsize % 16 == 0
        else:
            types.append((parameter.name, "fp32" if type(value) is float else "i32"))
            is_aligned = type(value) is int and value % 16 == 0
        if is_aligned and may_specialize and not parameter.do_not_specialize_on_alignment:
            aligned.append(index)
    return Launch(kernel, tuple(types), tuple(constants), tuple(aligned), tuple(options.items()))
