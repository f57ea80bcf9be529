// What all parts of slopes.cu share: what the work is, where things are in shared memory, which tiles meet.

constexpr int MAKERS = 2, STAGES = 4, BUFFERS = 3, WIDE = SIDE * MAKERS, THREADS = (MAKERS + 2) * GROUP;
constexpr u32 KEYS = 2 * MAKERS * TILE;  // bytes of a pass' keys and values

struct Work {
    const u16 *o, *dy;
    const float *ends;     // (B H, T): log2 of the sums of powers
    float *scratch, *sums; // (blocks, T, 64); (B 8, 3 H 64)
    const ANGLE *cos, *sin;
    long long o_row, o_head, o_token, dy_row, dy_head, dy_token, by_angle;
    int heads, length, left, right, items;
    float scale, slope;
};

// Turn rows back by the angles of their tokens; `token` is that of the thread's first row.
__device__ __forceinline__ void turn_back(float (&x)[32], const Work &work, int row, int token, u32 lane) {
    if (TURN == 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const long long at = row * work.by_angle + (token + 8 * half) * (SIDE / 2);
        const ANGLE *const cos = work.cos + at, *const sin = work.sin + at;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            if (TURN == 1) {
                const int block = n >> 1, e = n & 1, column = 8 * block + 2 * (lane & 3) + e;
                const float c = wide(cos[column]), s = wide(sin[column]);
                float &one = x[4 * block + 2 * half + e], &two = x[4 * (block + 4) + 2 * half + e];
                const float kept = one;
                one = one * c + two * s;
                two = two * c - kept * s;
            } else {
                const int column = 4 * n + (lane & 3);
                const float c = wide(cos[column]), s = wide(sin[column]);
                float &one = x[4 * n + 2 * half], &two = x[4 * n + 2 * half + 1];
                const float kept = one;
                one = one * c + two * s;
                two = two * c - kept * s;
            }
        }
    }
}

// An item: a row and head, which tiles of its queries see a pass' keys, and which pass is the first and the last that a
// tile sees.
struct Item {
    int row, head, length, left, right;
    __device__ __forceinline__ Item(const Work &work, int number)
        : row(number / work.heads), head(number % work.heads), length(work.length), left(work.left),
          right(work.right) {}
    __device__ __forceinline__ int passes() const { return (length - 1) / WIDE + 1; }
    __device__ __forceinline__ int begin(int pass) const { return max(pass * WIDE - right, 0) / SIDE; }
    __device__ __forceinline__ int end(int pass) const {
        return min(min(pass * WIDE + WIDE, length) - 1 + left, length - 1) / SIDE + 1;
    }
    __device__ __forceinline__ int opens(int tile) const { return max(tile * SIDE - left, 0) / WIDE; }
    __device__ __forceinline__ int closes(int tile) const {
        return min(tile * SIDE + SIDE - 1 + right, length - 1) / WIDE;
    }
    __device__ __forceinline__ bool whole(int tile, int key) const {
        return key < length && key + SIDE - 1 <= tile * SIDE + right && key >= tile * SIDE + SIDE - 1 - left;
    }
};

// No weight where a query does not see a key; s and t are the first of a thread's.
__device__ __forceinline__ void hide(float (&x)[32], const Item &item, int s, int t) {
    int apart = t - s, room = item.length - s, left = item.left, right = item.right;
    // Nothing of this is worth a register before it is needed.
    asm volatile("" : "+r"(apart), "+r"(room), "+r"(left), "+r"(right));
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int down = 4 * (i & 2), here = apart + 8 * (i >> 2) + (i & 1) - down;
        if (here > left || -here > right || down >= room) x[i] = 0.0f;
    }
}

// Of a query, an eighth of its output and of the slope of that, and log2 of its sum of powers.
struct Asked {
    uint4 o, dy;
    float end;
    __device__ __forceinline__ Asked(const Work &work, const Item &item, int t, u32 part) {
        const u16 *const from_o = work.o + item.row * work.o_row + item.head * work.o_head + t * work.o_token;
        const u16 *const from_dy = work.dy + item.row * work.dy_row + item.head * work.dy_head + t * work.dy_token;
        o = *reinterpret_cast<const uint4 *>(from_o + part * 8);
        dy = *reinterpret_cast<const uint4 *>(from_dy + part * 8);
        end = work.ends[static_cast<size_t>(item.row * work.heads + item.head) * work.length + t];
    }
    // What is known of two queries are four numbers: both logarithms, both products.
    __device__ __forceinline__ void tell(float *stats, int t, u32 part) const {
        float sum = dot(o, dy);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 4);
        float *const at = stats + (t >> 1) * 4 + (t & 1);
        if (part == 0) at[0] = end, at[2] = sum;
    }
};

// Where things are in shared memory.
struct Shared {
    u32 keys;        // keys and values of two passes
    u32 stages;      // tiles of queries and of slopes of outputs
    u32 between;     // slopes of weights, of three tiles
    u32 leaving;     // slopes of each maker's keys
    float *stats;    // what is known of two items' queries
    float *sums;     // over tokens, of each warp
    // Barriers: a stage is full, slopes of weights are made and used, a pass' keys are ready and used, an item is begun
    // and the next one is told of.
    u32 full, made, used, ready, past, begun, told;
};

// A number that counts around a ring, and how often it has come around.
template <int SIZE> struct Ring {
    u32 at = 0, round = 0;
    __device__ __forceinline__ void next() {
        if (++at == SIZE) at = 0, round ^= 1;
    }
};

// Sums over the tokens of an item: a line of queries', keys' and values' places for each of a row's eight warps.
__device__ __forceinline__ float *line_of(const Work &work, const Item &item, u32 warp, int kind) {
    const size_t line = item.row * 4 * MAKERS + warp;
    return work.sums + ((line * 3 + kind) * work.heads + item.head) * SIDE;
}
