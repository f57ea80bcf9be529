"""What kernels of this package share: functions of single values, and when a launch begins and ends."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def early(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next launch begin as soon as all programs of this one have."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def late(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the launch before, whose results are read from here on."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def bent(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """An activation of float32 values, by its name in parts.activations."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh" or ACT == "gelu_fast":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "relu2":
        y = tl.maximum(x, 0.0)
        y = y * y
    else:
        tl.static_assert(ACT == "identity", "an activation that no kernel knows")
        y = x
    return y


@triton.jit
def bent_and_slope(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """`bent`, and its derivative at x."""
    if ACT == "silu" or ACT == "quick_gelu" or ACT == "gelu_tanh" or ACT == "gelu_fast":
        # x sigmoid(z), and z' of the z at hand.
        if ACT == "silu":
            z = x
            steep = 1.0
        elif ACT == "quick_gelu":
            z = 1.702 * x
            steep = 1.702
        else:
            z = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            steep = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        open = tl.sigmoid(z)
        y = x * open
        slope = open + y * (1.0 - open) * steep
    elif ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "relu2":
        y = tl.maximum(x, 0.0)
        slope = 2.0 * y
        y = y * y
    else:
        tl.static_assert(ACT == "identity", "an activation that no kernel knows")
        y = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """tanh by exponentials of negative numbers alone, which cannot overflow."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def capped(x, cap):  # type: ignore[no-untyped-def]
    """cap * tanh(x / cap)."""
    return cap * tanh(x / cap)
