// Words for kernels of GPUs of NVIDIA's Hopper generation that work on tiles of 64 x 64 numbers of bfloat16 in shared
// memory: barriers, copies by the units for tiles, products by groups of four warps. A group's product (64, 64) lies in
// registers as tensor cores leave it: number 4n + 2i + e of a thread is of row 16 warp + lane / 4 + 8i, column
// 8n + 2 (lane % 4) + e. Reference: https://docs.nvidia.com/cuda/parallel-thread-execution/.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int SIDE = 64, GROUP = 128;
constexpr u32 TILE = SIDE * SIDE * 2;

struct alignas(64) Map {
    u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void begin_barrier(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(phase) : "memory");
}

// What the cache forgets first: what is read or written once in a while, so that sums have the room.
__device__ __forceinline__ u64 forgotten() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ u64 remembered() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void load(const Map *map, u32 to, u32 barrier, int token, int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::
            "r"(to), "l"(map), "r"(barrier), "r"(0), "r"(token), "r"(head), "r"(row), "l"(forgotten()) : "memory");
}

__device__ __forceinline__ void store(const Map *map, u32 from, int token, int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::
            "l"(map), "r"(from), "r"(0), "r"(token), "r"(head), "r"(row), "l"(forgotten()) : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void await_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void await_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void sync_group(u32 group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Rows of 64 numbers, eight of them a pattern of 1,024 bytes in which 16 bytes each are exchanged.
__device__ __forceinline__ u64 described(u32 address) {
    return static_cast<u64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

constexpr u64 ALONG = 2, DOWN = 128;  // 16 numbers further in a row, 16 rows further

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT> __device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// What a product has written is not read before this.
__device__ __forceinline__ void settle(float (&d)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define SUMS_OF(d)                                                                                                     \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),        \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),         \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),        \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PLACES                                                                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "  \
    "%24, %25, %26, %27, %28, %29, %30, %31}"

// d = a b or d + a b, for 16 of what is summed over, from shared memory; TURNED where that are the rows of b.
template <int TURNED> __device__ __forceinline__ void multiply(float (&d)[32], u64 a, u64 b, int onto) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", %32, %33, more, 1, 1, 0, %35;\n}"
                 : SUMS_OF(d) : "l"(a), "l"(b), "r"(onto), "n"(TURNED));
}

// The same onto d with a from registers, b turned.
__device__ __forceinline__ void multiply_onto(float (&d)[32], const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : SUMS_OF(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ void narrow(const float (&x)[32], u32 (&y)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) y[i] = pair_of(x[2 * i], x[2 * i + 1]);
}

// Write 16 rows a warp of a tile (64, 64), or the 16 columns that they are of its transpose.
template <bool ACROSS> __device__ __forceinline__ void put(u32 tile, const u32 (&x)[16], u32 warp, u32 lane) {
    const u32 part = lane >> 3, row = lane & 7;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const u32 block = 2 * n + (part >> 1), own = 2 * warp + (part & 1);
        if (ACROSS) {
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             tile + (8 * block + row) * 128 + ((own ^ row) << 4)),
                         "r"(x[4 * n]), "r"(x[4 * n + 1]), "r"(x[4 * n + 2]), "r"(x[4 * n + 3]) : "memory");
        } else {
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             tile + (8 * own + row) * 128 + ((block ^ row) << 4)),
                         "r"(x[4 * n]), "r"(x[4 * n + 1]), "r"(x[4 * n + 2]), "r"(x[4 * n + 3]) : "memory");
        }
    }
}

// Two numbers of shared memory, read where this stands and no later.
__device__ __forceinline__ float2 shared_pair(u32 from) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from));
    return pair;
}

// Four sums of global memory: begun, added to.
__device__ __forceinline__ void begin_four(float4 *to, const float *x) {
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3]), "l"(remembered()) : "memory");
}

__device__ __forceinline__ void add_four(float4 *to, const float *x) {
    asm volatile("red.relaxed.gpu.global.add.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x[0]),
                 "f"(x[1]), "f"(x[2]), "f"(x[3]), "l"(remembered()) : "memory");
}

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }

// Add the sums of a warp's 16 rows to `to` (64).
__device__ __forceinline__ void add_rows(const float (&x)[32], float *to, u32 lane) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        float sums[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int upper = 16 * part + 4 * (i >> 1) + (i & 1);
            sums[i] = x[upper] + x[upper + 2];
        }
#pragma unroll
        for (int half = 4, far = 16; half; half >>= 1, far >>= 1) {
            const bool upper = lane & far;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const float given = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
                sums[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, far);
            }
        }
        // Number 4a + 2b + e of the eight is of block 2a + b, and stays with the lane whose bits 4, 3, 2 are a, b, e.
        const u32 block = 4 * part + 2 * (lane >> 4 & 1) + (lane >> 3 & 1);
        to[8 * block + 2 * (lane & 3) + (lane >> 2 & 1)] += sums[0];
    }
}

__device__ __forceinline__ float dot(const uint4 &x, const uint4 &y) {
    const u32 one[4] = {x.x, x.y, x.z, x.w}, two[4] = {y.x, y.y, y.z, y.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum += __uint_as_float(one[i] << 16) * __uint_as_float(two[i] << 16);
        sum += __uint_as_float(one[i] & 0xFFFF0000u) * __uint_as_float(two[i] & 0xFFFF0000u);
    }
    return sum;
}
