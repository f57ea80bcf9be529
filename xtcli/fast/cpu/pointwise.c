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
