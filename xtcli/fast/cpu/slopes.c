/* The slopes of attention.c, by squares of GROUP queries and BLOCK keys. Axes and names as there. */

#include "lanes.h"
#include "team.h"

/* Columns of weights of some rows, times those rows, added to (ROWS, width). */
__attribute__((noinline)) static void returned(int64_t rows, int64_t width, const float *weights, int64_t line,
                                               const float *from, float *to) {
    int64_t i = 0;
    for (; i + WIDE <= width; i += WIDE) tile(ROWS, 2, rows, weights, 1, line, from + i, width, to + i, width, 1);
    if (i < width) tile(ROWS, 1, rows, weights, 1, line, from + i, width, to + i, width, 1);
}

/* Weights of ROWS / 2 queries and WIDE keys, and slopes of their scores: both products and what follows in registers.
 * `rows`, `slopes` (ROWS / 2, width), panels of keys and values; `added` (ROWS / 2, WIDE): a mask, or none; seen[i]
 * keys of these are seen. */
INLINE void weighed(const int64_t width, const float *rows, const float *slopes, const float *keys, const float *values,
                    const float *norms, const float *inner, const float *added, const int64_t *seen, float *weights,
                    float *slope) {
    vec s[ROWS / 2][2], d[ROWS / 2][2];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS / 2; i++) s[i][0] = s[i][1] = d[i][0] = d[i][1] = all(0.0f);
    for (int64_t k = 0; k < width; k++) {
        const vec k0 = load(keys + k * WIDE), k1 = load(keys + k * WIDE + LANES);
        const vec v0 = load(values + k * WIDE), v1 = load(values + k * WIDE + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS / 2; i++) {
            const vec row = all(rows[i * width + k]), by = all(slopes[i * width + k]);
            s[i][0] += row * k0, s[i][1] += row * k1, d[i][0] += by * v0, d[i][1] += by * v1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS / 2; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vec score = s[i][j];
            if (added) {
                const vec more = load(added + i * WIDE + j * LANES);
                score = pick(more == all(-INFINITY), more, score + more);
            }
            vec weight = power(score - all(norms[2 * i])) * all(norms[2 * i + 1]);
            vec out = weight * (d[i][j] - all(inner[i]));
            if (seen) {
                const ivec there = counting() + j * LANES < all_whole((int32_t)seen[i]);
                weight = pick(there, weight, all(0.0f)), out = pick(there, out, all(0.0f));
            }
            store(weights + i * APART + j * LANES, weight);
            store(slope + i * APART + j * LANES, out);
        }
}

/* What of a mask is added to the scores of ROWS / 2 queries and WIDE keys. */
static void added(const attention *a, int64_t batch, int64_t head, int64_t query, int64_t key, float *to) {
    for (int64_t row = 0; row < ROWS / 2; row++, to += WIDE) {
        memset(to, 0, sizeof(float) * WIDE);
        if (query + row < a->queries) mask(a, batch, head, query + row, key, least(WIDE, a->keys - key), to);
    }
}

/* Weights and slopes of scores (GROUP, APART) of `count` queries from `first` and BLOCK keys from `key`; zeros where
 * nothing is seen. */
__attribute__((noinline)) static void weights_and_slopes(const attention *a, int64_t batch, int64_t head, int64_t first,
                                                         int64_t count, int64_t key, const float *rows,
                                                         const float *slopes, const float *keys, const float *values,
                                                         const float *norms, const float *inner, float *weights,
                                                         float *slope) {
    const int64_t width = a->width, end = least(BLOCK, a->keys - key);
    float more[ROWS / 2 * WIDE];
    for (int64_t at = 0; at < count; at += ROWS / 2, weights += ROWS / 2 * APART, slope += ROWS / 2 * APART) {
        const int64_t reach = a->causal ? least(first + at + ROWS / 2 - key, end) : end;
        int64_t seen[ROWS / 2], from = 0;
        for (; from < reach; from += WIDE) {
            const float *these[] = {keys + from * width, values + from * width};
            const int whole = from + WIDE <= (a->causal ? least(first + at + 1 - key, end) : end);
            for (int64_t i = 0; i < ROWS / 2; i++) seen[i] = (a->causal ? least(first + at + i + 1 - key, end) : end) - from;
            if (a->masked) added(a, batch, head, first + at, key + from, more);
            const float *q = rows + at * width, *d = slopes + at * width, *norm = norms + 2 * at, *in = inner + at;
            if (a->masked)
                weighed(width, q, d, these[0], these[1], norm, in, more, seen, weights + from, slope + from);
            else if (whole) weighed(width, q, d, these[0], these[1], norm, in, 0, 0, weights + from, slope + from);
            else weighed(width, q, d, these[0], these[1], norm, in, 0, seen, weights + from, slope + from);
        }
        for (int64_t i = 0; i < ROWS / 2 && from < BLOCK; i++) {
            memset(weights + i * APART + from, 0, sizeof(float) * (BLOCK - from));
            memset(slope + i * APART + from, 0, sizeof(float) * (BLOCK - from));
        }
    }
}

/* All slopes of one group of heads of one text. */
static void group_slopes(const attention *a, int64_t batch, int64_t group, float *room) {
    const int64_t width = a->width, high = rounded(a->keys, ROWS), shared = a->heads / a->groups;
    float *weights = room, *slope = weights + GROUP * APART, *q = slope + GROUP * APART, *d = q + GROUP * width;
    float *dq = d + GROUP * width, *dk = dq + GROUP * width, *dv = dk + high * width;
    float *key_panels = dv + high * width, *value_panels = key_panels + block(a), *keys = value_panels + block(a);
    panels(a, &a->k, batch, group, a->keys, LOG2E, key_panels);
    panels(a, &a->v, batch, group, a->keys, 1.0f, value_panels);
    move(head_of(&a->k, batch, group), a->k.token, a->keys, width, 1.0f, keys, width);
    memset(dk, 0, sizeof(float) * 2 * high * width);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
        for (int64_t first = 0; first < a->queries; first += GROUP) {
            const int64_t count = least(GROUP, a->queries - first), end = seeing(a, first + count - 1);
            const float *out = head_of(&a->out, batch, head) + first * a->out.token;
            float norms[2 * GROUP] = {0}, inner[GROUP] = {0};
            memcpy(norms, a->norms + 2 * ((batch * a->heads + head) * a->queries + first), sizeof(float) * 2 * count);
            gather(head_of(&a->q, batch, head) + first * a->q.token, a->q.token, count, GROUP, width, a->scale, q);
            gather(head_of(&a->slope, batch, head) + first * a->slope.token, a->slope.token, count, GROUP, width, 1.0f, d);
            for (int64_t row = 0; row < count; row++) {
                vec both = all(0.0f);
                for (int64_t i = 0; i < width; i += LANES)
                    both += load(d + row * width + i) * load(out + row * a->out.token + i);
                inner[row] = sum(both);
            }
            for (int64_t key = 0; key < end; key += BLOCK) {
                weights_and_slopes(a, batch, head, first, count, key, q, d, key_panels + key * width,
                                   value_panels + key * width, norms, inner, weights, slope);
                for (int64_t at = 0; at < count; at += ROWS) {
                    const int64_t depth = least(BLOCK, seeing(a, first + at) - key);
                    const float *these = slope + at * APART, *from = keys + key * width;
                    if (depth > 0) mixed(width, depth, these, APART, from, dq + at * width, key > 0);
                }
                for (int64_t at = 0; at < BLOCK && key + at < end; at += ROWS) {
                    /* Queries before the first of these keys do not see them. */
                    const int64_t from = a->causal && key + at > first ? key + at - first : 0, to = (key + at) * width;
                    returned(count - from, width, weights + from * APART + at, APART, d + from * width, dv + to);
                    returned(count - from, width, slope + from * APART + at, APART, q + from * width, dk + to);
                }
            }
            move(dq, width, count, width, a->scale, head_of(&a->dq, batch, head) + first * a->dq.token, a->dq.token);
        }
    move(dk, width, a->keys, width, 1.0f, head_of(&a->dk, batch, group), a->dk.token);
    move(dv, width, a->keys, width, 1.0f, head_of(&a->dv, batch, group), a->dv.token);
}

static void backward(void *given) {
    attention *a = given;
    float *room = a->room + threads.number() * a->share;
    for (int64_t pair; (pair = take(&a->next)) < a->batch * a->groups;)
        group_slopes(a, pair / a->groups, pair % a->groups, room);
}

void xt_attention_slopes(attention *a, int64_t team) { threads.run(backward, a, (unsigned)team, 0); }
