/* A step of decoding for one row in one call: a token's vector through all layers to the logits.
 *
 *     h = x + w o(attention(norm(x)))          x = h + w down(act(gate(norm h)) up(norm h))
 *
 * Nearly all its time goes into reading the weights once. All threads go through it together: each takes rows of a
 * matrix as they are left, so that they read as fast as memory gives, and they wait for each other where a vector must
 * be whole. Norms are so short that each thread makes its own.
 *
 * Widths of all vectors are multiples of LANES. Axes: K width of the stream, C slots, D width of a head.
 */

#include "acts.h"
#include "team.h"

typedef struct {
    const float *weight, *bias; /* (rows, columns), (rows,) or none */
    int64_t rows, columns;
} matrix;

typedef struct {
    int64_t kind; /* 0: none, 1: layer, 2: rms */
    const float *gain, *shift;
    float eps;
} norm;

typedef struct {
    norm norm, ffn_norm, q_norm, k_norm;
    matrix q, k, v, out, gate, up, down; /* without a gate, `up` alone is bent */
    const float *cos, *sin;              /* (C, half), or none */
    int64_t half, interleaved;
    int64_t heads, groups, width, left; /* left: slots before its own that a token sees, -1 for all */
    float scale, weight, ffn_weight;
    int64_t act, parallel;
    float *keys, *values; /* (groups, C, width) */
} layer;

typedef struct {
    const float *table, *places;
    float scale;
    float cap; /* 0: none */
    int64_t layers, width, capacity, widest;
    const layer *layer;
    norm norm;
    matrix head;
    float *x, *h, *asked, *mixed, *inner, *logits;
    float *room; /* of each thread: `share` floats */
    int64_t share;
    int64_t token, slot, pad, place;
    meeting meeting;
    _Atomic int64_t *next; /* one for each round of work */
} step;

#define PIECE_BYTES 65536 /* of weights that a thread takes at a time */
#define FAR 4096          /* floats that are called for before they are read */

/* `count` sums of rows (count, columns) times x. */
INLINE void dots(const int count, const float *rows, int64_t columns, const float *x, float *sums) {
    vec s[4];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) s[r] = all(0.0f);
    for (int64_t i = 0; i < columns; i += LANES) {
        const vec here = load(x + i);
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            const float *at = rows + r * columns + i;
            __builtin_prefetch(at + FAR, 0, 2);
            s[r] += load(at) * here;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) sums[r] = sum(s[r]);
}

/* Rows `first` to `end` of a matrix times x, with their biases. */
__attribute__((noinline)) static void times(const matrix *m, int64_t first, int64_t end, const float *x, float *y) {
    int64_t row = first;
    for (; row + 4 <= end; row += 4) dots(4, m->weight + row * m->columns, m->columns, x, y + row - first);
    for (; row < end; row++) dots(1, m->weight + row * m->columns, m->columns, x, y + row - first);
    if (m->bias)
        for (row = first; row < end; row++) y[row - first] += m->bias[row];
}

static inline int64_t piece_rows(const matrix *m) {
    const int64_t rows = PIECE_BYTES / 4 / m->columns / LANES * LANES;
    return rows < LANES ? LANES : rows;
}

/* The next rows of a matrix that nobody has; false when none are left. */
static inline int some(const matrix *m, _Atomic int64_t *next, int64_t *first, int64_t *end) {
    const int64_t rows = piece_rows(m);
    *first = take(next) * rows;
    *end = *first + rows < m->rows ? *first + rows : m->rows;
    return *first < m->rows;
}

static const float *normed(const norm *n, int64_t width, const float *x, float *to) {
    if (!n->kind) return x;
    vec total = all(0.0f), squares = all(0.0f);
    float mean = 0.0f;
    if (n->kind == 1) {
        for (int64_t i = 0; i < width; i += LANES) total += load(x + i);
        mean = sum(total) / (float)width;
    }
    for (int64_t i = 0; i < width; i += LANES) {
        const vec far = load(x + i) - all(mean);
        squares += far * far;
    }
    const float share = 1.0f / sqrtf(sum(squares) / (float)width + n->eps);
    for (int64_t i = 0; i < width; i += LANES) {
        const vec y = (load(x + i) - all(mean)) * all(share) * load(n->gain + i);
        store(to + i, n->shift ? y + load(n->shift + i) : y);
    }
    return to;
}

/* One head through its norm and its rotation, in place. */
static void turned(const layer *l, const norm *n, int64_t place, float *head, float *room) {
    const float *y = normed(n, l->width, head, room);
    if (y != head) memcpy(head, y, sizeof(float) * l->width);
    if (!l->cos) return;
    const float *cos = l->cos + place * l->half, *sin = l->sin + place * l->half;
    for (int64_t i = 0; i < l->half; i++) {
        float *one = head + (l->interleaved ? 2 * i : i), *other = head + (l->interleaved ? 2 * i + 1 : i + l->half);
        const float a = *one, b = *other;
        *one = a * cos[i] - b * sin[i];
        *other = b * cos[i] + a * sin[i];
    }
}

/* What one head makes of the slots that it sees. room: a weight for each. */
static void attended(const step *s, const layer *l, const float *q, const float *keys, const float *values, float *room,
                     float *out) {
    const int64_t width = l->width, pad = s->pad < s->slot ? s->pad : s->slot;
    const int64_t first = l->left >= 0 && s->slot - l->left > pad ? s->slot - l->left : pad, count = s->slot + 1 - first;
    const float scale = l->scale * LOG2E;
    float most = -INFINITY;
    keys += first * width, values += first * width;
    for (int64_t slot = 0; slot < count; slot++) {
        vec total = all(0.0f);
        for (int64_t i = 0; i < width; i += LANES) total += load(q + i) * load(keys + slot * width + i);
        room[slot] = sum(total) * scale;
        most = room[slot] > most ? room[slot] : most;
    }
    for (int64_t slot = count; slot % LANES; slot++) room[slot] = -INFINITY;
    vec total = all(0.0f);
    for (int64_t slot = 0; slot < count; slot += LANES) {
        const vec weight = power(load(room + slot) - all(most));
        total += weight;
        store(room + slot, weight);
    }
    const float share = 1.0f / sum(total);
    for (int64_t i = 0; i < width; i += LANES) {
        vec mixed = all(0.0f);
        for (int64_t slot = 0; slot < count; slot++) mixed += all(room[slot]) * load(values + slot * width + i);
        store(out + i, mixed * all(share));
    }
}

static void group_attends(const step *s, const layer *l, int64_t group, float *room) {
    const int64_t width = l->width, each = l->heads / l->groups;
    float *k = s->asked + (l->heads + group) * width, *v = k + l->groups * width;
    float *keys = l->keys + group * s->capacity * width, *values = l->values + group * s->capacity * width;
    turned(l, &l->k_norm, s->place, k, room);
    memcpy(keys + s->slot * width, k, sizeof(float) * width);
    memcpy(values + s->slot * width, v, sizeof(float) * width);
    for (int64_t head = group * each; head < (group + 1) * each; head++) {
        turned(l, &l->q_norm, s->place, s->asked + head * width, room);
        attended(s, l, s->asked + head * width, keys, values, room, s->mixed + head * width);
    }
}

/* A matrix times y, added to `stream`. */
static void onto(const matrix *m, float weight, const float *y, const float *stream, float *to, float *room,
                 _Atomic int64_t *next) {
    for (int64_t first, end; some(m, next, &first, &end);) {
        times(m, first, end, y, room);
        for (int64_t row = first; row < end; row++) to[row] = stream[row] + weight * room[row - first];
    }
}

/* `count` values, filled up to whole vectors, through the activation, times those of a gate's other branch. */
static void bend(int64_t act, int64_t count, float *x, const float *other) {
#define BEND(kind)                                                                                                     \
    case kind:                                                                                                         \
        for (int64_t i = 0; i < count; i += LANES)                                                                     \
            store(x + i, other ? bent(kind, load(x + i)) * load(other + i) : bent(kind, load(x + i)));                 \
        break;
    switch (act) {
        BEND(GELU) BEND(GELU_TANH) BEND(SILU) BEND(QUICK_GELU) BEND(RELU) BEND(RELU2) BEND(IDENTITY)
    }
#undef BEND
}

static void run_layer(step *s, const layer *l, float *norms, float *room, int size, _Atomic int64_t **round) {
    const float *read = normed(&l->norm, s->width, s->x, norms);
    const matrix *parts[3] = {&l->q, &l->k, &l->v};
    float *to = s->asked;
    for (int i = 0; i < 3; to += parts[i]->rows, i++, ++*round)
        for (int64_t first, end; some(parts[i], *round, &first, &end);) times(parts[i], first, end, read, to + first);
    meet(&s->meeting, size);
    for (int64_t group; (group = take(*round)) < l->groups;) group_attends(s, l, group, room);
    ++*round;
    meet(&s->meeting, size);
    onto(&l->out, l->weight, s->mixed, s->x, s->h, room, (*round)++);
    meet(&s->meeting, size);
    read = normed(&l->ffn_norm, s->width, l->parallel ? s->x : s->h, norms);
    for (int64_t first, end; some(&l->up, *round, &first, &end);) {
        const int64_t count = end - first;
        float *other = room + s->widest;
        times(l->gate.weight ? &l->gate : &l->up, first, end, read, room);
        if (l->gate.weight) times(&l->up, first, end, read, other);
        bend(l->act, count, room, l->gate.weight ? other : 0);
        memcpy(s->inner + first, room, sizeof(float) * count);
    }
    ++*round;
    meet(&s->meeting, size);
    onto(&l->down, l->ffn_weight, s->inner, s->h, s->x, room, (*round)++);
    meet(&s->meeting, size);
}

static void run(void *given) {
    step *s = given;
    const int me = threads.number(), size = threads.size();
    float *norms = s->room + me * s->share, *room = norms + s->width;
    _Atomic int64_t *round = s->next;
    if (!me)
        for (int64_t i = 0; i < s->width; i += LANES) {
            const vec x = load(s->table + s->token * s->width + i) * all(s->scale);
            store(s->x + i, s->places ? x + load(s->places + s->place * s->width + i) : x);
        }
    meet(&s->meeting, size);
    for (int64_t number = 0; number < s->layers; number++) run_layer(s, s->layer + number, norms, room, size, &round);
    const float *read = normed(&s->norm, s->width, s->x, norms);
    for (int64_t first, end; some(&s->head, round, &first, &end);) {
        times(&s->head, first, end, read, s->logits + first);
        if (s->cap != 0.0f)
            for (int64_t row = first; row < end; row++) s->logits[row] = s->cap * tanhf(s->logits[row] / s->cap);
    }
}

#define ROUNDS 7 /* of work in a layer */

int64_t xt_step_rounds(const step *s) { return s->layers * ROUNDS + 1; }

void xt_step(step *s, int64_t team) {
    for (int64_t i = 0; i < xt_step_rounds(s); i++) atomic_store_explicit(&s->next[i], 0, memory_order_relaxed);
    atomic_store(&s->meeting.arrived, 0);
    atomic_store(&s->meeting.round, 0);
    threads.run(run, s, (unsigned)team, 0);
}
