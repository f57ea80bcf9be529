// The keeper of slopes.cu: slopes of queries, and copies into shared memory.

// The keeper's copies of tiles, by one thread.
struct Loader {
    const Work &work;
    const Reach &reach;
    const Shared &at;
    const Map *q, *dy, *k, *v;
    int item, pass, tile, end, row, head, keys_item, keys_pass = 0;
    u32 loaded = 0, keys_loaded = 0;

    __device__ __forceinline__ void queries() {
        if (item >= work.items) return;
        const u32 stage = loaded++ % STAGES, to = at.stages + stage * 2 * TILE, barrier = at.full + 8 * stage;
        expect(barrier, 2 * TILE);
        load(q, to, barrier, tile * SIDE, head, row);
        load(dy, to + TILE, barrier, tile * SIDE, head, row);
        if (++tile < end) return;
        if (++pass == work.passes) {
            pass = 0, item += gridDim.x;
            row = item / work.heads, head = item % work.heads;
        }
        tile = reach.begin(pass * WIDE), end = reach.end(pass * WIDE);
    }

    __device__ __forceinline__ void keys() {
        if (keys_item >= work.items) return;
        const u32 buffer = keys_loaded++ & 1, to = at.keys + buffer * KEYS, barrier = at.ready + 8 * buffer;
        const int row = keys_item / work.heads, head = keys_item % work.heads;
        expect(barrier, KEYS);
        for (int maker = 0; maker < MAKERS; ++maker) {
            load(k, to + maker * TILE, barrier, keys_pass * WIDE + maker * SIDE, head, row);
            load(v, to + (MAKERS + maker) * TILE, barrier, keys_pass * WIDE + maker * SIDE, head, row);
        }
        if (++keys_pass == work.passes) keys_pass = 0, keys_item += gridDim.x;
    }
};

__device__ __forceinline__ void keep(const Work &work, const Shared &at, const Map &dq, Loader loader, u32 own) {
    const u32 warp = own >> 5, lane = own & 31;
    const Reach reach{work.length, work.left, work.right};
    float *const sums = at.sums + (4 * MAKERS * 2 + warp) * SIDE;
    const size_t first = static_cast<size_t>(blockIdx.x) * (work.length * (SIDE / 4));
    float4 *const scratch = reinterpret_cast<float4 *>(work.scratch) + first + own;
    if (own == 0) {
        loader.keys();
        for (int ahead = 1; ahead < STAGES; ++ahead) loader.queries();
        loader.keys();
    }
    Asked asked;
    u32 count = 0, rounds = 0, number = 0;
    for (int item = blockIdx.x; item < work.items; item += gridDim.x, ++number) {
        const int row = item / work.heads, head = item % work.heads, next = item + gridDim.x;
        float *const stats = at.stats + (number + 1 & 1) * 2 * work.length;
        int known = next < work.items ? 0 : work.length;
        if (known < work.length) ask(asked, work, next, own >> 3, own & 7);
        if (SUMS) sums[lane] = sums[lane + 32] = 0.0f;
        for (int pass = 0; pass < work.passes; ++pass, ++rounds) {
            const u32 keys = at.keys + (rounds & 1) * KEYS;
            const int begin = reach.begin(pass * WIDE), end = reach.end(pass * WIDE);
            for (int tile = begin; tile < end; ++tile, ++count) {
                const u32 buffer = count & 1, theirs = at.between + buffer * MAKERS * TILE;
                const bool opens = reach.opens(tile) == pass, closes = reach.closes(tile) == pass;
                float4 *const kept = scratch + static_cast<size_t>(tile) * 8 * GROUP;
                float to_q[32];
                if (closes && !opens) {
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        const float4 four = __ldcg(kept + n * GROUP);
                        to_q[4 * n] = four.x, to_q[4 * n + 1] = four.y;
                        to_q[4 * n + 2] = four.z, to_q[4 * n + 3] = four.w;
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 32; ++i) to_q[i] = 0.0f;
                }
                wait(at.made + 8 * buffer, count >> 1 & 1);
                // All makers are past the step before, and where a pass has begun, past what the last one left.
                if (own == 0) {
                    loader.queries();
                    if (tile == begin && rounds > 0) loader.keys();
                }
                __syncwarp();
                begin_products();
#pragma unroll
                for (int maker = 0; maker < MAKERS; ++maker) {
                    const u64 a = described(theirs + maker * TILE), b = described(keys + maker * TILE);
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply<1>(to_q, a + n * ALONG, b + n * DOWN, 1);
                }
                commit_products();
                if (known < work.length) {
                    tell(stats, asked, known + (own >> 3), own & 7);
                    known += GROUP / 8;
                    if (known < work.length) ask(asked, work, next, known + (own >> 3), own & 7);
                }
                await_products<0>();
                settle(to_q);
                if (closes) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) to_q[i] *= work.slope;
                    turn_back(to_q, work, row, tile * SIDE + 16 * warp + (lane >> 2), lane);
                    if (SUMS) add_rows(to_q, sums, lane);
                    u32 narrowed[16];
                    narrow(to_q, narrowed);
                    sync_group(MAKERS);
                    put<false>(theirs, narrowed, warp, lane);
                    show_to_copies();
                    sync_group(MAKERS);
                    if (own == 0) {
                        store(&dq, theirs, tile * SIDE, head, row);
                        commit_stores();
                        await_reads();
                    }
                    __syncwarp();
                    if (lane == 0) arrive(at.used + 8 * buffer);
                } else {
                    if (lane == 0) arrive(at.used + 8 * buffer);
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        const float4 four = make_float4(to_q[4 * n], to_q[4 * n + 1], to_q[4 * n + 2], to_q[4 * n + 3]);
                        opens ? __stcg(kept + n * GROUP, four) : add_to(kept + n * GROUP, four);
                    }
                }
            }
        }
        for (; known < work.length; known += GROUP / 8) {
            ask(asked, work, next, known + (own >> 3), own & 7);
            tell(stats, asked, known + (own >> 3), own & 7);
        }
        __syncwarp();
        if (lane == 0) arrive(at.told);
        if (SUMS) {
            for (int i = lane; i < SIDE; i += 32) {
                line_of(work, row, head, warp, 0)[i] = sums[i];
                for (int maker = 1; maker < MAKERS; ++maker) line_of(work, row, head, 4 * maker + warp, 0)[i] = 0.0f;
            }
            __syncwarp();
        }
    }
    if (own == 0) await_stores();
}
