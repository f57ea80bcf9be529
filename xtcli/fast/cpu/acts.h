/* Activations by number, in the order of `KINDS` in pointwise.py. */

#pragma once

#include "lanes.h"

enum { IDENTITY, GELU, GELU_TANH, SILU, QUICK_GELU, RELU, RELU2 };

/* 1 / (1 + e^-x) */
INLINE vec sigmoid(vec x) { return all(1.0f) / (all(1.0f) + power(x * all(-LOG2E))); }

/* The standard normal distribution, error 1e-7, and e^(-x^2 / 2); Abramowitz and Stegun 1964, 7.1.26. */
INLINE vec normal(vec x, vec *bell) {
    const vec size = larger(x, -x) * all(0.707106781f), t = all(1.0f) / (all(1.0f) + all(0.3275911f) * size);
    vec y = all(1.061405429f);
    y = y * t + all(-1.453152027f);
    y = y * t + all(1.421413741f);
    y = y * t + all(-0.284496736f);
    y = y * t + all(0.254829592f);
    *bell = power(size * size * all(-LOG2E));
    y = y * t * *bell * all(0.5f);
    return pick(x > all(0.0f), all(1.0f) - y, y);
}

/* In its tanh form gelu is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
#define TWICE 1.59576912f
#define CUBE 0.044715f

INLINE vec bent(const int kind, vec x) {
    vec bell;
    switch (kind) {
    case GELU: return x * normal(x, &bell);
    case GELU_TANH: return x * sigmoid(x * (x * x * all(TWICE * CUBE) + all(TWICE)));
    case SILU: return x * sigmoid(x);
    case QUICK_GELU: return x * sigmoid(x * all(1.702f));
    case RELU: return larger(all(0.0f), x);
    case RELU2: return larger(all(0.0f), x) * larger(all(0.0f), x);
    default: return x;
    }
}

INLINE vec bent_slope(const int kind, vec x) {
    if (kind == GELU) {
        vec bell;
        const vec share = normal(x, &bell);
        return share + x * bell * all(0.398942280f);
    }
    const vec square = x * x, s = sigmoid(x * (square * all(TWICE * CUBE) + all(TWICE)));
    return s + x * s * (all(1.0f) - s) * (square * all(3.0f * TWICE * CUBE) + all(TWICE));
}
