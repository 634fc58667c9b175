"""Compile the kernels that a call would launch, for GPUs that are not here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")


@dataclass
class Launch:
    """One launch: the kernel and what it was given."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """What the launcher would compile: integers of one are constants, multiples of 16 are known as such."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def describe(value: Any, path: tuple[int, ...], constant: bool) -> Any:
            if isinstance(value, tuple):
                return tuple(describe(item, (*path, place), constant) for place, item in enumerate(value))
            if constant or value is None or (type(value) is int and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, torch.Tensor):
                name, aligned = _POINTERS[value.dtype], value.data_ptr() % 16 == 0
            else:
                name, aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
            if aligned:
                attributes[path] = [["tt.divisibility", 16]]
            return name

        for position, parameter in enumerate(self.kernel.params):
            signature[parameter.name] = describe(self.arguments[parameter.name], (position,), parameter.is_constexpr)
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, capability: int) -> Any:
        return triton.compile(self.source(), target=GPUTarget("cuda", capability, 32), options=self.options)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            names = [parameter.name for parameter in self.kernel.params]
            self.launches.append(Launch(self.kernel, dict(zip(names, args, strict=False)) | kwargs, options))

        return launch


@contextmanager
def recorded(module: ModuleType) -> Iterator[list[Launch]]:
    """Note what a module's kernels are given instead of launching them."""
    launches: list[Launch] = []
    kernels = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels, f"{module.__name__} has no kernels"
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def stack_bytes(cubin: bytes) -> int:
    """Memory that a thread of a kernel has for what does not fit its registers."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-res-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", told))
