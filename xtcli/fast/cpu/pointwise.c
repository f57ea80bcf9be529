/* GELU of float32 and its slope, in either form. */

#include "acts.h"
#include "team.h"

#define PIECE 8192

typedef struct {
    const float *x, *slope; /* slope: of what comes out; without it, no slope is asked for */
    float *out;
    int64_t count, kind;
    _Atomic int64_t next;
} pointwise;

INLINE void piece(const int kind, const int slopes, const float *x, const float *slope, float *out, int64_t count) {
    for (int64_t i = 0; i + LANES <= count; i += LANES)
        store(out + i, slopes ? load(slope + i) * bent_slope(kind, load(x + i)) : bent(kind, load(x + i)));
}

static void any(const pointwise *p, const float *x, const float *slope, float *out, int64_t count) {
    if (p->kind == GELU && slope) piece(GELU, 1, x, slope, out, count);
    else if (p->kind == GELU) piece(GELU, 0, x, slope, out, count);
    else if (slope) piece(GELU_TANH, 1, x, slope, out, count);
    else piece(GELU_TANH, 0, x, slope, out, count);
}

static void pieces(void *given) {
    pointwise *p = given;
    for (int64_t at; (at = PIECE * take(&p->next)) < p->count;) {
        const int64_t count = p->count - at < PIECE ? p->count - at : PIECE, rest = count % LANES, last = at + count - rest;
        any(p, p->x + at, p->slope ? p->slope + at : 0, p->out + at, count);
        if (!rest) continue;
        float x[LANES] = {0}, slope[LANES] = {0}, out[LANES];
        memcpy(x, p->x + last, sizeof(float) * rest);
        if (p->slope) memcpy(slope, p->slope + last, sizeof(float) * rest);
        any(p, x, p->slope ? slope : 0, out, LANES);
        memcpy(p->out + last, out, sizeof(float) * rest);
    }
}

void xt_pointwise(pointwise *p, int64_t team) { threads.run(pieces, p, (unsigned)team, 0); }

#define TOGETHER 32 /* rows whose slopes are added up in one sum */

typedef struct {
    const float *x, *bias, *slope; /* rows side by side; slope: of what comes out, or none */
    float *out;                    /* may be the memory of slope */
    float *sums;                   /* (rows / TOGETHER rounded up, columns): of slopes */
    int64_t rows, columns, kind;   /* columns: a multiple of LANES */
    _Atomic int64_t next;
} biased;

INLINE void biased_rows(const int kind, const biased *b, int64_t first, int64_t end) {
    float *sums = b->slope ? b->sums + first / TOGETHER * b->columns : 0;
    if (sums) memset(sums, 0, sizeof(float) * b->columns);
    for (int64_t row = first; row < end; row++) {
        const float *x = b->x + row * b->columns;
        float *out = b->out + row * b->columns;
        if (!sums) {
            for (int64_t i = 0; i < b->columns; i += LANES) store(out + i, bent(kind, load(x + i) + load(b->bias + i)));
            continue;
        }
        const float *slope = b->slope + row * b->columns;
        for (int64_t i = 0; i < b->columns; i += LANES) {
            const vec y = load(slope + i) * bent_slope(kind, load(x + i) + load(b->bias + i));
            store(out + i, y);
            store(sums + i, load(sums + i) + y);
        }
    }
}

static void all_biased(void *given) {
    biased *b = given;
    for (int64_t first; (first = TOGETHER * take(&b->next)) < b->rows;) {
        const int64_t end = first + TOGETHER < b->rows ? first + TOGETHER : b->rows;
        if (b->kind == GELU) biased_rows(GELU, b, first, end);
        else biased_rows(GELU_TANH, b, first, end);
    }
}

void xt_biased(biased *b, int64_t team) { threads.run(all_biased, b, (unsigned)team, 0); }
