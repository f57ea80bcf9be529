/* The loss of rows of logits in float32 and its slope by them, in two passes over a row that stays in the cache. */

#include "lanes.h"
#include "team.h"

typedef struct {
    const float *logits; /* (rows, width), rows side by side */
    const int64_t *targets;
    float *losses, *slope; /* (rows,) and as logits */
    int64_t rows, width, ignored;
    float smoothing;
    _Atomic int64_t wrong, next; /* wrong: targets that are no column */
} crossed;

#define AT_ONCE 32

/* One row: e^(x - largest), its sum, then what is asked for. */
static void crossed_row(const crossed *c, const float *x, int64_t target, float *loss, float *slope) {
    const int64_t width = c->width, whole = width / LANES * LANES, rest = width - whole;
    float last[LANES], made[LANES];
    store(last, all(-INFINITY));
    memcpy(last, x + whole, sizeof(float) * rest);
    vec high = load(last), total = all(0.0f), plain = all(0.0f);
    for (int64_t i = 0; i < whole; i += LANES) high = larger(load(x + i), high);
    const float top = largest(high);
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec value = load(x + i), share = power((value - all(top)) * all(LOG2E));
        total += share, plain += value;
        store(slope + i, share);
    }
    const vec ending = power((load(last) - all(top)) * all(LOG2E));
    const float sums = sum(total + ending), each = c->smoothing / (float)width, size = top + logf(sums);
    for (int64_t i = 0; i < whole; i += LANES) store(slope + i, load(slope + i) * all(1.0f / sums) - all(each));
    store(made, ending * all(1.0f / sums) - all(each));
    memcpy(slope + whole, made, sizeof(float) * rest);
    slope[target] += c->smoothing - 1.0f;
    *loss = (c->smoothing - 1.0f) * (x[target] - size);
    if (c->smoothing == 0.0f) return;
    float logs = sum(plain) - (float)width * size;
    for (int64_t i = whole; i < width; i++) logs += x[i];
    *loss -= each * logs;
}

static void crossed_rows(void *given) {
    crossed *c = given;
    for (int64_t first; (first = AT_ONCE * take(&c->next)) < c->rows;)
        for (int64_t row = first; row < first + AT_ONCE && row < c->rows; row++) {
            const int64_t target = c->targets[row];
            float *slope = c->slope + row * c->width;
            if (target >= 0 && target < c->width && target != c->ignored) {
                crossed_row(c, c->logits + row * c->width, target, c->losses + row, slope);
                continue;
            }
            c->losses[row] = 0.0f;
            memset(slope, 0, sizeof(float) * c->width);
            if (target != c->ignored) atomic_fetch_add_explicit(&c->wrong, 1, memory_order_relaxed);
        }
}

/* The number of targets that are no column. */
int64_t xt_crossed(crossed *c, int64_t team) {
    threads.run(crossed_rows, c, (unsigned)team, 0);
    return c->wrong;
}
