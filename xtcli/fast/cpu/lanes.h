/* Vectors of as many floats as the CPU adds at once, and functions of them. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* A tile of a product is ROWS x 2 vectors of sums: what the registers hold beside its operands. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 12
#else
#define ROWS 6
#endif
#define WIDE (2 * LANES)

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

INLINE vec load(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, vec x) { memcpy(to, &x, sizeof x); }

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec pick(ivec where, vec yes, vec no) { return (vec)(((ivec)yes & where) | ((ivec)no & ~where)); }

INLINE ivec all_whole(int32_t x) { return x - (ivec){0}; }

/* 0, 1, 2 ... */
INLINE ivec counting(void) {
    ivec x;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x;
}

/* LANES vectors as rows: their columns, in place. */
INLINE void transposed(vec x[LANES]) {
#if defined(__clang__) || !defined(__OPTIMIZE__)
    float from[LANES * LANES], to[LANES];
    memcpy(from, x, sizeof from);
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LANES; j++) to[j] = from[j * LANES + i];
        x[i] = load(to);
    }
#else
    /* Squares of the half size change places, then those within them. */
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) {
        const ivec at = counting(), upper = (at & half) != 0;
        const ivec first = ((at + (LANES - half)) & upper) | (at & ~upper);
        const ivec second = ((at + LANES) & upper) | ((at + half) & ~upper);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & half)) {
                const vec a = x[i], b = x[i + half];
                x[i] = __builtin_shuffle(a, b, first);
                x[i + half] = __builtin_shuffle(a, b, second);
            }
    }
#endif
}

/* The larger of two; b where one is NaN. */
INLINE vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

/* Sums and maxima by halves: one lane after the other takes as long as a row of scores. */
INLINE float sum(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float at[LANES];
    store(at, x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) at[i] += at[i + half];
    return at[0];
#endif
}

INLINE float largest(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float at[LANES];
    store(at, x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) at[i] = at[i] > at[i + half] ? at[i] : at[i + half];
    return at[0];
#endif
}

/* 2^x, relative error 3e-7; 0 below -126, where float32 has no normal numbers left, and NaN of NaN. */
INLINE vec power(vec x) {
#if defined(__AVX512F__)
    /* Underflow takes a hundred cycles: such lanes are left out. */
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)all(-126.0f), _CMP_NLT_UQ);
    const vec n = (vec)_mm512_roundscale_ps((__m512)x, 8), r = x - n;
#else
    const ivec gone = x < all(-126.0f);
    x = pick(x > all(127.0f), all(127.0f), x);
    /* x = n + r: adding 1.5 * 2^23 leaves n in the low bits. */
    const vec shift = all(12582912.0f), whole = x + shift, r = x - (whole - shift);
#endif
    /* Least relative error on -0.5 to 0.5 among polynomials of this degree. */
    vec y = all(0.00132764445f);
    y = y * r + all(0.00967553724f);
    y = y * r + all(0.0555071346f);
    y = y * r + all(0.240221202f);
    y = y * r + all(0.693146944f);
    y = y * r + all(1.00000012f);
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_scalef_ps(kept, (__m512)y, (__m512)n);
#else
    return (vec)(((ivec)y + ((ivec)whole << 23)) & ~gone);
#endif
}

#define LOG2E 1.44269504f

/* A tile of C (rows, cols * LANES) = A B, or added to C: A[i, k] at a[i * ar + k * ak], rows of B and C apart by bk, cr. */
INLINE void tile(const int rows, const int cols, int64_t depth, const float *a, int64_t ar, int64_t ak, const float *b,
                 int64_t bk, float *c, int64_t cr, const int add) {
    vec sums[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < cols; j++) sums[i][j] = add ? load(c + i * cr + j * LANES) : all(0.0f);
    for (int64_t k = 0; k < depth; k++, b += bk, a += ak) {
        vec x[2];
#pragma GCC unroll 2
        for (int j = 0; j < cols; j++) x[j] = load(b + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const vec factor = all(a[i * ar]);
#pragma GCC unroll 2
            for (int j = 0; j < cols; j++) sums[i][j] += factor * x[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < cols; j++) store(c + i * cr + j * LANES, sums[i][j]);
}
