"""cuBLASLt, the part of NVIDIA's library that multiplies matrices with work beside the product in the same kernel.

PyTorch loads the library and offers two of its epilogues; here are those that training needs:

    BIAS            D + bias                                       bias (m,)
    GELU_AUX_BIAS   gelu_tanh(D + bias), and D + bias beside it    aux (m, n)
    DGELU           D * gelu_tanh'(aux)

Matrices are column-major as the library has it: D (m, n) = op(A) op(B) (+ C), inner width k. A row-major tensor (r, c)
is a column-major matrix (c, r). Reference: https://docs.nvidia.com/cuda/cublas/, "Using the cuBLASLt API".

The library names a few kernels for a shape by a model of their speed. It names others, often faster ones, for shapes
near by; all that fit are timed at a product's first use (trials.py), unless one was chosen for about as many rows.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xtcli.fast import counters
from xtcli.fast.trials import Chosen, fastest

PLAIN, BIAS, GELU_AUX_BIAS, DGELU = 1, 4, 164, 192
_AUXILIARY = (GELU_AUX_BIAS, DGELU)

TYPES = {torch.bfloat16: 14, torch.float16: 2}
"""cudaDataType of what is multiplied."""

_FLOAT32, _COMPUTE_32F = 0, 68
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _VECTOR_AT, _AUX_AT, _AUX_STRIDE = 3, 4, 7, 8, 11, 12
_WORKSPACE_LIMIT = 1
WORKSPACE = 2**25
"""Bytes of scratch that a product may take: what NVIDIA advises for Hopper."""

CANDIDATES = 16
"""Kernels that the library is asked for at most."""
NEAR = (0.5, 2.0, 0.25, 4.0)
"""Shapes near by have one of k, m and n so many times as large."""
SWIZZLES = (0, 1, 2)
"""Orders of tiles that are tried with the best kernels."""
_SWIZZLE = 4
NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")
CHOSEN: Chosen[Any] = Chosen()


class Failed(Exception):
    """The library refused; the message has the call and its status."""


class _Found(ctypes.Structure):
    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@cache
def library() -> Any | None:
    """The library that PyTorch has loaded; None where there is no GPU, or none of these versions."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.current_blas_handle()
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", byref(handle))
    return handle


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        raise Failed(f"{name}: status {status}")


class Product:
    """D (m, n) = op(A) op(B) of one shape, type and epilogue, by the kernel that is fastest for it on this device.

    onto: whether a matrix C, of D's shape and type, is added before the epilogue.
    """

    def __init__(
        self, m: int, n: int, k: int, turn_a: bool, turn_b: bool, epilogue: int, dtype: torch.dtype, device: int,
        onto: bool = False,
    ) -> None:  # fmt: skip
        self.epilogue, self.device, self.lock = epilogue, device, threading.Lock()
        self.shape, self.turns, self.kind = (m, n, k), (turn_a, turn_b), TYPES[dtype]
        self.one, self.beta = c_float(1.0), c_float(1.0 if onto else 0.0)
        self.description = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self.description), _COMPUTE_32F, _FLOAT32)
        self._set(_TRANSPOSE_A, c_int32(turn_a))
        self._set(_TRANSPOSE_B, c_int32(turn_b))
        self._set(_EPILOGUE, c_uint32(epilogue))
        self.layouts = self._layouts(m, n, k)
        self.chosen: Any = None
        self.needs = WORKSPACE
        # The gradient of a weight sums over rows.
        self.rows = k if turn_b else n
        self.family = (m, n if turn_b else k, turn_a, turn_b, epilogue, dtype, device, onto)

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        d: Tensor,
        vector: Tensor | None = None,
        aux: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> None:
        """Multiply into d; `vector` is the bias, `aux` is written or read as the epilogue says, `onto` is C."""
        with self.lock:
            if vector is not None:
                self._set(_VECTOR_AT, c_void_p(vector.data_ptr()))
            if aux is not None:
                self._set(_AUX_AT, c_void_p(aux.data_ptr()))
            c = d if onto is None else onto
            if self.chosen is None:
                self.chosen = self._choose(a, b, c, d)
                self.needs = self._scratch(self.chosen)
            self._run(a, b, c, d, self.chosen, self.needs)

    def _set(self, attribute: int, value: Any) -> None:
        _call(
            "cublasLtMatmulDescSetAttribute", self.description, attribute, byref(value), c_size_t(ctypes.sizeof(value))
        )

    def _layouts(self, m: int, n: int, k: int) -> tuple[c_void_p, c_void_p, c_void_p]:
        """Layouts of A, B and D; the description's stride of `aux` follows them."""
        turn_a, turn_b = self.turns
        if self.epilogue in _AUXILIARY:
            self._set(_AUX_STRIDE, c_int64(m))
        sizes = ((k, m) if turn_a else (m, k), (n, k) if turn_b else (k, n), (m, n))
        a, b, d = (_layout(self.kind, *size) for size in sizes)
        return a, b, d

    def _run(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, algorithm: Any, needs: int = WORKSPACE) -> None:
        counted = needs <= counters.SIZE
        scratch = None if counted else torch.empty(WORKSPACE, dtype=torch.uint8, device=d.device)
        at = counters.counters(self.device).place() if scratch is None else scratch.data_ptr()
        for_a, for_b, for_d = self.layouts
        _call(
            "cublasLtMatmul", _handle(self.device), self.description, byref(self.one),
            c_void_p(a.data_ptr()), for_a, c_void_p(b.data_ptr()), for_b, byref(self.beta),
            c_void_p(c.data_ptr()), for_d, c_void_p(d.data_ptr()), for_d, byref(algorithm),
            c_void_p(at), c_size_t(counters.SIZE if counted else WORKSPACE),
            c_void_p(torch.cuda.current_stream(d.device).cuda_stream),
        )  # fmt: skip

    def _choose(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        """The kernel of the shortest time, or one that was chosen for about as many rows; the library's first where a
        choice by time would change what is computed, or nothing can be timed. The pointers must be set, for they are
        looked at."""
        named = self._named(self.layouts)
        if not named:
            raise Failed("cublasLtMatmulAlgoGetHeuristic: no kernel")
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
            return named[0]
        for algorithm in CHOSEN.near(self.family, self.rows):
            if self._fits(algorithm):
                return algorithm
        found = fastest(lambda algorithm: self._run(a, b, c, d, algorithm), named, self._near(named), _swizzled, Failed)
        if found is None:
            raise Failed("cublasLtMatmul: no kernel runs")
        CHOSEN.add(self.family, self.rows, found)
        return found

    def _named(self, layouts: tuple[c_void_p, c_void_p, c_void_p]) -> list[Any]:
        """Kernels that the library names for matrices of these layouts, the likeliest to be fast first."""
        preference, count, limit = c_void_p(), c_int(), c_uint64(WORKSPACE)
        a, b, d = layouts
        found = (_Found * CANDIDATES)()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        _call("cublasLtMatmulPreferenceSetAttribute", preference, _WORKSPACE_LIMIT, byref(limit), c_size_t(8))
        # A shape for which there is no kernel is an error to the library.
        status = library().cublasLtMatmulAlgoGetHeuristic(  # type: ignore[union-attr]
            _handle(self.device), self.description, a, b, d, d, preference, CANDIDATES, found, byref(count)
        )
        _call("cublasLtMatmulPreferenceDestroy", preference)
        return [] if status else [found[number].algorithm for number in range(count.value)]

    def _near(self, known: list[Any]) -> list[Any]:
        """Kernels beside `known` that the library names for shapes near by and that fit this one, those first that it
        holds to be the fastest of theirs."""
        m, n, k = self.shape
        lists = []
        for times in NEAR:
            for shape in ((m, n, _scaled(k, times)), (_scaled(m, times), n, k), (m, _scaled(n, times), k)):
                layouts = self._layouts(*shape)
                lists.append(self._named(layouts))
                for layout in layouts:
                    _call("cublasLtMatrixLayoutDestroy", layout)
        if self.epilogue in _AUXILIARY:
            self._set(_AUX_STRIDE, c_int64(m))
        found = {bytes(algorithm): algorithm for algorithm in known}
        old = len(found)
        for rank in range(CANDIDATES):
            for one in lists:
                if rank < len(one):
                    found.setdefault(bytes(one[rank]), one[rank])
        return [algorithm for algorithm in list(found.values())[old:] if self._fits(algorithm)]

    def _fits(self, algorithm: Any) -> bool:
        return self._scratch(algorithm) <= WORKSPACE

    def _scratch(self, algorithm: Any) -> int:
        """Bytes that a kernel needs for this product; more than there are where it cannot make it."""
        a, b, d = self.layouts
        found = _Found()
        status = library().cublasLtMatmulAlgoCheck(  # type: ignore[union-attr]
            _handle(self.device), self.description, a, b, d, d, byref(algorithm), byref(found)
        )
        return WORKSPACE + 1 if status or found.state else found.workspace


def _scaled(size: int, times: float) -> int:
    """About `times` the size, a multiple of what tiles are made of."""
    return max(int(size * times) // 64 * 64, 64)


def _swizzled(algorithm: Any) -> list[Any]:
    """The same kernel with its tiles in other orders."""
    made = []
    for order in SWIZZLES:
        other, value = type(algorithm)(*algorithm), c_uint32(order)
        status = library().cublasLtMatmulAlgoConfigSetAttribute(  # type: ignore[union-attr]
            byref(other), _SWIZZLE, byref(value), c_size_t(ctypes.sizeof(value))
        )
        if not status and bytes(other) != bytes(algorithm):
            made.append(other)
    return made


def _layout(kind: int, rows: int, columns: int) -> c_void_p:
    layout = c_void_p()
    _call("cublasLtMatrixLayoutCreate", byref(layout), kind, c_uint64(rows), c_uint64(columns), c_int64(rows))
    return layout


@cache
def product(
    m: int, n: int, k: int, turn_a: bool, turn_b: bool, epilogue: int, dtype: torch.dtype, device: int,
    onto: bool = False,
) -> Product:  # fmt: skip
    """The product of this shape, made once."""
    return Product(m, n, k, turn_a, turn_b, epilogue, dtype, device, onto)
