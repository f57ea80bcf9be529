"""From CUDA C++ to functions on a GPU: by NVRTC, the compiler library that PyTorch brings along, and the driver.

What is compiled lies under $XT_CACHE, else ~/.cache/xt: kernels/<key>.cubin, where the key is made from the source, the
flags and the compiler's version. A file is whole or absent. Reference: https://docs.nvidia.com/cuda/nvrtc/.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import sys
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from xtcli.errors import UserError
from xtcli.runs.folder import cache_folder, write_atomically

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
FLAGS = ("--gpu-architecture=sm_90a", "--std=c++17")
_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Failed(Exception):
    """The compiler or the driver refused; the message has the call and what it said."""


@cache
def compiler() -> Any | None:
    """NVRTC; None where it is not to be found."""
    for name in NAMES:
        for place in (name, *_beside_pytorch(name)):
            with suppress(OSError):
                return ctypes.CDLL(place)
    return None


def _beside_pytorch(name: str) -> list[str]:
    """Files of that name in the packages by which NVIDIA's libraries are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [str(file) for root in roots for file in sorted(Path(root).glob(f"*/lib/{name}"))]


@cache
def suits(device: int) -> bool:
    """Whether the kernels are for this GPU: one of compute capability 9.0."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def missed(reason: str) -> None:
    """Tell the user, once, that kernels cannot be had."""
    print(f"xt: kernels in CUDA C++ cannot be had, slower ones are used: {reason}", file=sys.stderr, flush=True)


@cache
def driver() -> Any:
    """The driver's library."""
    return ctypes.CDLL("libcuda.so.1")


def compiled(source: str) -> bytes:
    """Machine code of `source`, from the cache if it is there; raises Failed with the compiler's words."""
    library = compiler()
    if library is None:
        raise Failed(f"none of {', '.join(NAMES)} is installed")
    major, minor = c_int(), c_int()
    library.nvrtcVersion(byref(major), byref(minor))
    key = hashlib.sha256("\0".join((source, *FLAGS, f"{major.value}.{minor.value}")).encode()).hexdigest()[:24]
    file = cache_folder() / "kernels" / f"{key}.cubin"
    with suppress(OSError):
        return file.read_bytes()
    code = _compile(library, source)
    # Without a cache, or with a full disk, it is compiled anew in each process.
    with suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, code)
    return code


def _compile(library: Any, source: str) -> bytes:
    program, size = c_void_p(), c_size_t()
    words = (c_char_p * len(FLAGS))(*(flag.encode() for flag in FLAGS))
    library.nvrtcCreateProgram(byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        status = library.nvrtcCompileProgram(program, len(FLAGS), words)
        if status:
            library.nvrtcGetProgramLogSize(program, byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise Failed(f"nvrtcCompileProgram: status {status}\n{log.value.decode()}")
        library.nvrtcGetCUBINSize(program, byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))


def call(name: str, *arguments: Any) -> None:
    """Call the driver; raises Failed."""
    status = getattr(driver(), name)(*arguments)
    if status:
        said = c_char_p()
        driver().cuGetErrorString(status, byref(said))
        raise Failed(f"{name}: {(said.value or b'?').decode()} ({status})")


class Kernel:
    """A function of compiled code, on the device whose context is current; `memory` is its shared memory in bytes."""

    def __init__(self, code: bytes, name: str, threads: int, memory: int) -> None:
        self.threads, self.memory = threads, memory
        module, self.function = c_void_p(), c_void_p()
        call("cuModuleLoadData", byref(module), code)
        call("cuModuleGetFunction", byref(self.function), module, name.encode())
        call("cuFuncSetAttribute", self.function, _MEMORY, memory)

    def __call__(self, blocks: int, stream: int, *arguments: Any) -> None:
        """Launch that many blocks; arguments are ctypes' values and structures."""
        places = (c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        call(
            "cuLaunchKernel", self.function, blocks, 1, 1, self.threads, 1, 1, self.memory, c_void_p(stream), places,
            None,
        )  # fmt: skip
