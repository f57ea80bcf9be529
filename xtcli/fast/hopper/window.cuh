// What both sides of slopes.cu share: what the work is, where things are in shared memory, which tiles meet.

constexpr int MAKERS = 2, STAGES = 4, WIDE = SIDE * MAKERS, THREADS = (MAKERS + 1) * GROUP;
constexpr u32 KEYS = 2 * MAKERS * TILE;  // bytes of a pass' keys and values

struct Work {
    const u16 *o, *dy;
    const float *ends;     // (items, T): log2 of the sums of powers
    float *scratch, *sums; // (blocks, T, 64); (B 8, 3 H 64)
    const ANGLE *cos, *sin;
    long long o_row, o_head, o_token, dy_row, dy_head, dy_token, by_angle;
    int heads, length, left, right, items, passes;
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

// Which tiles of queries see a pass' keys, and which pass is the first and the last that a tile sees.
struct Reach {
    int length, left, right;
    __device__ __forceinline__ int begin(int first) const { return max(first - right, 0) / SIDE; }
    __device__ __forceinline__ int end(int first) const {
        return min(min(first + WIDE, length) - 1 + left, length - 1) / SIDE + 1;
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
__device__ __forceinline__ void hide(float (&x)[32], Reach reach, int s, int t) {
    int apart = t - s, room = reach.length - s;
    // Nothing of this is worth a register before it is needed.
    asm volatile("" : "+r"(apart), "+r"(room), "+r"(reach.left), "+r"(reach.right));
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int down = 4 * (i & 2), here = apart + 8 * (i >> 2) + (i & 1) - down;
        if (here > reach.left || -here > reach.right || down >= room) x[i] = 0.0f;
    }
}

// Of a query, an eighth of its output and of the slope of that, and log2 of its sum of powers.
struct Asked {
    uint4 o, dy;
    float end;
};

__device__ __forceinline__ void ask(Asked &asked, const Work &work, int item, int t, u32 part) {
    const int row = item / work.heads, head = item % work.heads;
    const u16 *const o = work.o + row * work.o_row + head * work.o_head + t * work.o_token;
    const u16 *const dy = work.dy + row * work.dy_row + head * work.dy_head + t * work.dy_token;
    asked.o = *reinterpret_cast<const uint4 *>(o + part * 8);
    asked.dy = *reinterpret_cast<const uint4 *>(dy + part * 8);
    asked.end = work.ends[static_cast<size_t>(item) * work.length + t];
}

// What is known of two queries are four numbers: both logarithms, both products.
__device__ __forceinline__ void tell(float *stats, const Asked &asked, int t, u32 part) {
    float sum = dot(asked.o, asked.dy);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 4);
    float *const at = stats + (t >> 1) * 4 + (t & 1);
    if (part == 0) at[0] = asked.end, at[2] = sum;
}

__device__ __forceinline__ void add_to(float4 *to, const float4 &x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w) : "memory");
}

// Where things are in shared memory.
struct Shared {
    u32 keys;        // keys and values of two passes
    u32 stages;      // tiles of queries and of slopes of outputs
    u32 between;     // slopes of weights, of two tiles
    float *stats;    // what is known of two items' queries
    float *sums;     // over tokens, of each warp
    // Barriers: a stage is full, slopes of weights are made and used, a pass' keys are ready, the next item is told of.
    u32 full, made, used, ready, told;
};

// Sums over the tokens of an item: a line of (3 H 64) for each of a row's eight warps.
__device__ __forceinline__ float *line_of(const Work &work, int row, int head, u32 warp, int kind) {
    return work.sums + (static_cast<size_t>(row * 4 * MAKERS + warp) * 3 + kind) * work.heads * SIDE + head * SIDE;
}
