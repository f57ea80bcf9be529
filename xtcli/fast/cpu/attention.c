/* Attention of float32 and its slopes, by rows of scores that stay in the cache:
 *
 *     P = softmax(scale Q K^T + mask)      O = P V
 *     dS = P (dO V^T - rowsum(dO O))       dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO
 *
 * A row of scores is whole, so no sum is rescaled (unlike Dao et al. 2022, arXiv:2205.14135, whose backward pass this is
 * otherwise). Tiles are ROWS queries x WIDE keys. A thread lays the keys and values that it works on out anew, in panels
 * (width, WIDE) or side by side, since memory is slow and its cache is not. Pieces of work are whole, so results do not
 * depend on the number of threads.
 *
 * Axes: B batch, H heads, G groups of key/value heads, T queries, S keys, D width of a head, a multiple of LANES.
 */

#include "lanes.h"
#include "team.h"

#define BAND (4 * ROWS) /* queries at a time */
#define DEPTH 128       /* keys at a time where their values are mixed */

/* Queries and keys whose weights and slopes are in the cache at a time, keys in whole tiles and panels; rows apart. */
#define GROUP (4 * ROWS)
#define BLOCK 96
#define APART (BLOCK + LANES)

typedef struct {
    float *at;
    int64_t batch, head, token; /* strides; the last axis lies together */
} tensor;

typedef struct {
    int64_t batch, heads, groups, queries, keys, width;
    int64_t causal;    /* T = S, and a query sees the past and itself */
    int64_t masked;    /* 0: no mask; 1: bytes, nonzero where a key is seen; 2: floats that are added */
    const void *mask;  /* strides for batch, head, query and key, 0 where all share */
    int64_t mask_strides[4];
    float scale;
    tensor q, k, v, out;
    float *norms;       /* (B, H, T, 2): of each row of scores the largest, times log2(e), and 1 / sum of e^(score - largest) */
    tensor slope;       /* of out */
    tensor dq, dk, dv;
    float *room;        /* scratch of each thread */
    int64_t share;      /* floats of one thread's scratch */
    int64_t bands;      /* of queries that are one piece of work of the forward pass */
    _Atomic int64_t next;
} attention;

static inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Columns of scores that tiles write or read for so many keys. */
static inline int64_t reached(int64_t keys) {
    const int64_t panels = rounded(keys, WIDE), tiles = rounded(rounded(keys, ROWS), LANES);
    return panels > tiles ? panels : tiles;
}

/* Distance of two rows of scores, no power of two, whose multiples would meet in the same places of a cache. */
static inline int64_t line(const attention *a) { return reached(a->keys) + LANES; }

/* Floats of keys laid out. */
static inline int64_t block(const attention *a) { return rounded(a->keys, WIDE) * a->width; }

/* Floats of scratch that a thread needs. */
int64_t xt_attention_room(const attention *a, int64_t slopes) {
    const int64_t scores = slopes ? 2 * GROUP * APART : BAND * line(a);
    const int64_t rows = slopes ? 3 * GROUP + 2 * rounded(a->keys, ROWS) : 2 * BAND;
    return rounded(scores + rows * a->width + (slopes ? 3 : 2) * block(a), 16);
}

static inline float *head_of(const tensor *of, int64_t batch, int64_t head) {
    return of->at + batch * of->batch + head * of->head;
}

/* Panels (width, WIDE) of `keys` rows, times a number. */
static void panels(const attention *a, const tensor *from, int64_t batch, int64_t group, int64_t keys, float scale,
                   float *to) {
    const float *head = head_of(from, batch, group);
    for (int64_t first = 0; first < keys; first += LANES) {
        const int64_t here = least(LANES, keys - first), place = first / WIDE * WIDE * a->width + first % WIDE;
        for (int64_t i = 0; i < a->width; i += LANES) {
            vec square[LANES];
#pragma GCC unroll 16
            for (int64_t key = 0; key < LANES; key++)
                square[key] = key < here ? load(head + (first + key) * from->token + i) * all(scale) : all(0.0f);
            transposed(square);
#pragma GCC unroll 16
            for (int64_t row = 0; row < LANES; row++) store(to + place + (i + row) * WIDE, square[row]);
        }
    }
    /* The last panel is whole. */
    for (int64_t i = 0; i < a->width && (keys + LANES - 1) / LANES % 2; i++)
        store(to + rounded(keys, WIDE) * a->width - (a->width - i) * WIDE + LANES, all(0.0f));
}

/* Rows from one place to another, times a number. */
static void move(const float *from, int64_t apart, int64_t rows, int64_t width, float scale, float *to, int64_t to_apart) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES)
            store(to + row * to_apart + i, load(from + row * apart + i) * all(scale));
}

/* Rows of a tensor side by side, zeros behind the last. */
static void gather(const float *from, int64_t apart, int64_t rows, int64_t padded, int64_t width, float scale, float *to) {
    move(from, apart, rows, width, scale, to, width);
    memset(to + rows * width, 0, sizeof(float) * (padded - rows) * width);
}

/* Keys that some of ROWS queries see. */
static inline int64_t seeing(const attention *a, int64_t first) { return a->causal ? least(first + ROWS, a->keys) : a->keys; }

/* Rows (BAND, width) times panels -> (BAND, line), as far as some of ROWS queries see, and some more to fill up vectors. */
__attribute__((noinline)) static void scores(const attention *a, int64_t first, int64_t count, const float *rows,
                                             const float *panel, float *to) {
    const int64_t width = a->width, apart = line(a), end = seeing(a, first + count - 1);
    for (int64_t key = 0; key < end; key += WIDE, panel += width * WIDE)
        for (int64_t at = 0; at < count; at += ROWS) {
            const int64_t left = seeing(a, first + at) - key;
            if (left > LANES) tile(ROWS, 2, width, rows + at * width, width, 1, panel, WIDE, to + at * apart + key, apart, 0);
            else if (left > 0)
                tile(ROWS, 1, width, rows + at * width, width, 1, panel, WIDE, to + at * apart + key, apart, 0);
        }
}

/* Weights (ROWS, depth) times rows (depth, width), or added to (ROWS, width). */
__attribute__((noinline)) static void mixed(int64_t width, int64_t depth, const float *weights, int64_t apart,
                                            const float *rows, float *to, int64_t add) {
    for (int64_t i = 0; i < width; i += WIDE)
        if (width - i < WIDE) tile(ROWS, 1, depth, weights, apart, 1, rows + i, width, to + i, width, add);
        else if (add) tile(ROWS, 2, depth, weights, apart, 1, rows + i, width, to + i, width, 1);
        else tile(ROWS, 2, depth, weights, apart, 1, rows + i, width, to + i, width, 0);
}

/* Add the mask to a row of scores of so many keys from `first`. */
static void mask(const attention *a, int64_t batch, int64_t head, int64_t query, int64_t first, int64_t keys, float *row) {
    const int64_t *apart = a->mask_strides;
    const int64_t at = batch * apart[0] + head * apart[1] + query * apart[2] + first * apart[3];
    if (a->masked == 1) {
        const uint8_t *seen = (const uint8_t *)a->mask + at;
        for (int64_t key = 0; key < keys; key++) row[key] = seen[key * apart[3]] ? row[key] : -INFINITY;
    } else if (a->masked == 2) {
        const float *added = (const float *)a->mask + at;
        for (int64_t key = 0; key < keys; key++) row[key] += added[key * apart[3]] * LOG2E;
    }
}

/* A row of scores, its first `seen` keys, to 2^(score - most) with zeros up to `end`. */
static void exponentials(float *row, int64_t seen, int64_t end, float *norm) {
    /* Keys behind the last are as if unseen, so that vectors are whole. */
    const int64_t last = (seen - 1) / LANES * LANES;
    store(row + last, pick(counting() < all_whole((int32_t)(seen - last)), load(row + last), all(-INFINITY)));
    vec high = load(row), other = high;
    int64_t key = LANES;
    for (; key + LANES < seen; key += WIDE) {
        high = larger(load(row + key), high);
        other = larger(load(row + key + LANES), other);
    }
    if (key < seen) high = larger(load(row + key), high);
    const float top = largest(larger(high, other)), origin = top == -INFINITY ? 0.0f : top;
    vec total = all(0.0f);
    for (key = 0; key < seen; key += LANES) {
        const vec weight = power(load(row + key) - all(origin));
        total += weight;
        store(row + key, weight);
    }
    for (; key < end; key += LANES) store(row + key, all(0.0f));
    /* Where nothing is seen, nothing comes out. */
    const float whole = sum(total);
    norm[0] = origin;
    norm[1] = whole == 0.0f ? 0.0f : 1.0f / whole;
}

/* Scratch of the forward pass. */
typedef struct {
    float *weights, *q, *made, *panels, *values;
} forward_room;

static void band(const attention *a, int64_t batch, int64_t head, int64_t first, const forward_room *room) {
    const int64_t width = a->width, apart = line(a), count = least(BAND, a->queries - first);
    float *out = head_of(&a->out, batch, head) + first * a->out.token;
    float *norms = a->norms + 2 * ((batch * a->heads + head) * a->queries + first);
    gather(head_of(&a->q, batch, head) + first * a->q.token, a->q.token, count, BAND, width, a->scale, room->q);
    scores(a, first, count, room->q, room->panels, room->weights);
    for (int64_t row = 0; row < count; row++) {
        float *these = room->weights + row * apart;
        const int64_t seen = a->causal ? first + row + 1 : a->keys;
        if (a->masked) mask(a, batch, head, first + row, 0, seen, these);
        exponentials(these, seen, seeing(a, first + row / ROWS * ROWS), norms + 2 * row);
    }
    for (int64_t key = 0; key < seeing(a, first + count - 1); key += DEPTH)
        for (int64_t at = 0; at < count; at += ROWS) {
            const int64_t depth = least(DEPTH, seeing(a, first + at) - key);
            const float *these = room->weights + at * apart + key, *values = room->values + key * width;
            if (depth > 0) mixed(width, depth, these, apart, values, room->made + at * width, key > 0);
        }
    for (int64_t row = 0; row < count; row++)
        move(room->made + row * width, width, 1, width, norms[2 * row + 1], out + row * a->out.token, 0);
}

static void forward(void *given) {
    attention *a = given;
    float *start = a->room + threads.number() * a->share;
    float *q = start + BAND * line(a), *made = q + BAND * a->width, *laid = made + BAND * a->width;
    const forward_room room = {start, q, made, laid, laid + block(a)};
    const int64_t pairs = a->batch * a->heads, length = a->bands * BAND, parts = (a->queries + length - 1) / length;
    /* The last queries see most keys: they are taken first. */
    for (int64_t unit; (unit = take(&a->next)) < pairs * parts;) {
        const int64_t batch = unit % pairs / a->heads, head = unit % pairs % a->heads, group = head / (a->heads / a->groups);
        const int64_t first = (parts - 1 - unit / pairs) * length, end = least(first + length, a->queries);
        const int64_t keys = seeing(a, end - 1);
        panels(a, &a->k, batch, group, keys, LOG2E, room.panels);
        move(head_of(&a->v, batch, group), a->v.token, keys, a->width, 1.0f, room.values, a->width);
        for (int64_t at = first; at < end; at += BAND) band(a, batch, head, at, &room);
    }
}

void xt_attention(attention *a, int64_t team) {
    /* Pieces enough to go round, none so small that laying keys out shows. */
    const int64_t all = (a->queries + BAND - 1) / BAND, pairs = a->batch * a->heads;
    a->bands = all;
    while (a->bands > 4 && pairs * (all / a->bands) < 4 * team) a->bands = (a->bands + 1) / 2;
    threads.run(forward, a, (unsigned)team, 0);
}
