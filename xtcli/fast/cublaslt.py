"""cuBLASLt, the part of NVIDIA's library that multiplies matrices with work beside the product in the same kernel.

PyTorch loads the library and offers two of its epilogues; here are those that training needs:

    BIAS            D + bias                                       bias (m,)
    GELU_AUX_BIAS   gelu_tanh(D + bias), and D + bias beside it    aux (m, n)
    DGELU           D * gelu_tanh'(aux)

Matrices are column-major as the library has it: D (m, n) = op(A) op(B), inner width k. A row-major tensor (r, c) is a
column-major matrix (c, r). Reference: https://docs.nvidia.com/cuda/cublas/, "Using the cuBLASLt API".
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

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
"""Kernels that are tried for a product, the first being what the library would take."""
TRIALS = 3
NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")


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
    """D (m, n) = op(A) op(B) of one shape, type and epilogue, by the kernel that is fastest for it on this device."""

    def __init__(
        self, m: int, n: int, k: int, turn_a: bool, turn_b: bool, epilogue: int, dtype: torch.dtype, device: int
    ) -> None:
        self.epilogue, self.device, self.lock = epilogue, device, threading.Lock()
        self.one, self.zero = c_float(1.0), c_float(0.0)
        self.description = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self.description), _COMPUTE_32F, _FLOAT32)
        self._set(_TRANSPOSE_A, c_int32(turn_a))
        self._set(_TRANSPOSE_B, c_int32(turn_b))
        self._set(_EPILOGUE, c_uint32(epilogue))
        if epilogue in _AUXILIARY:
            self._set(_AUX_STRIDE, c_int64(m))
        kind = TYPES[dtype]
        self.a = _layout(kind, *((k, m) if turn_a else (m, k)))
        self.b = _layout(kind, *((n, k) if turn_b else (k, n)))
        self.d = _layout(kind, m, n)
        self.algorithms: list[Any] = []
        self.chosen: Any = None

    def __call__(
        self, a: Tensor, b: Tensor, d: Tensor, vector: Tensor | None = None, aux: Tensor | None = None
    ) -> None:
        """Multiply into d; `vector` is the bias, `aux` is written or read as the epilogue says."""
        with self.lock:
            if vector is not None:
                self._set(_VECTOR_AT, c_void_p(vector.data_ptr()))
            if aux is not None:
                self._set(_AUX_AT, c_void_p(aux.data_ptr()))
            if self.chosen is None:
                self.algorithms = self._find()
                self.chosen = self._fastest(lambda algorithm: self._run(a, b, d, algorithm))
            self._run(a, b, d, self.chosen)

    def _set(self, attribute: int, value: Any) -> None:
        _call(
            "cublasLtMatmulDescSetAttribute", self.description, attribute, byref(value), c_size_t(ctypes.sizeof(value))
        )

    def _run(self, a: Tensor, b: Tensor, d: Tensor, algorithm: Any) -> None:
        scratch = torch.empty(WORKSPACE, dtype=torch.uint8, device=d.device)
        _call(
            "cublasLtMatmul", _handle(self.device), self.description, byref(self.one),
            c_void_p(a.data_ptr()), self.a, c_void_p(b.data_ptr()), self.b, byref(self.zero),
            c_void_p(d.data_ptr()), self.d, c_void_p(d.data_ptr()), self.d, byref(algorithm),
            c_void_p(scratch.data_ptr()), c_size_t(WORKSPACE),
            c_void_p(torch.cuda.current_stream(d.device).cuda_stream),
        )  # fmt: skip

    def _find(self) -> list[Any]:
        """Kernels that can do it, the likeliest to be fast first; the pointers must be set, for they are looked at."""
        preference, count = c_void_p(), c_int()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        limit = c_uint64(WORKSPACE)
        _call(
            "cublasLtMatmulPreferenceSetAttribute", preference, _WORKSPACE_LIMIT, byref(limit), c_size_t(8)
        )  # fmt: skip
        found = (_Found * CANDIDATES)()
        _call(
            "cublasLtMatmulAlgoGetHeuristic", _handle(self.device), self.description, self.a, self.b, self.d, self.d,
            preference, CANDIDATES, found, byref(count),
        )  # fmt: skip
        _call("cublasLtMatmulPreferenceDestroy", preference)
        if not count.value:
            raise Failed("cublasLtMatmulAlgoGetHeuristic: no kernel")
        return [found[number].algorithm for number in range(count.value)]

    def _fastest(self, run: Callable[[Any], None]) -> Any:
        """The kernel with the shortest median; the first where timing would change what is computed, or cannot be."""
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
            return self.algorithms[0]
        times = []
        for number, algorithm in enumerate(self.algorithms):
            try:
                times.append((_median(lambda chosen=algorithm: run(chosen)), number))  # type: ignore[misc]
            except Failed:
                continue
        if not times:
            raise Failed("cublasLtMatmul: no kernel runs")
        return self.algorithms[min(times)[1]]


def _median(run: Callable[[], None]) -> float:
    run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(TRIALS)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = sorted(begin.elapsed_time(end) for begin, end in pairs)
    return times[TRIALS // 2]


def _layout(kind: int, rows: int, columns: int) -> c_void_p:
    layout = c_void_p()
    _call("cublasLtMatrixLayoutCreate", byref(layout), kind, c_uint64(rows), c_uint64(columns), c_int64(rows))
    return layout


@cache
def product(
    m: int, n: int, k: int, turn_a: bool, turn_b: bool, epilogue: int, dtype: torch.dtype, device: int
) -> Product:
    """The product of this shape, made once."""
    return Product(m, n, k, turn_a, turn_b, epilogue, dtype, device)
