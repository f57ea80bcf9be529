// A maker of slopes.cu: weights, their slopes, and the slopes of keys and values.

__device__ __forceinline__ void make(const Work &work, const Shared &at, const Map &dk, const Map &dv, u32 maker,
                                     u32 own) {
    const u32 warp = own >> 5, lane = own & 31;
    const Reach reach{work.length, work.left, work.right};
    float *const sums = at.sums + (4 * maker + warp) * 2 * SIDE;
    u32 count = 0, rounds = 0, number = 0;
    for (int item = blockIdx.x; item < work.items; item += gridDim.x, ++number) {
        const int row = item / work.heads, head = item % work.heads;
        const float *const known_of = at.stats + (number & 1) * 2 * work.length;
        const float4 *const stats = reinterpret_cast<const float4 *>(known_of) + (lane & 3);
        if (number > 0) wait(at.told, number - 1 & 1);
        if (SUMS) {
            for (int i = lane; i < 2 * SIDE; i += 32) sums[i] = 0.0f;
            __syncwarp();
        }
        for (int pass = 0; pass < work.passes; ++pass, ++rounds) {
            const int key = pass * WIDE + maker * SIDE, end = reach.end(pass * WIDE);
            const u32 for_k = at.keys + (rounds & 1) * KEYS + maker * TILE, for_v = for_k + MAKERS * TILE;
            const u64 keys = described(for_k), values = described(for_v);
            float to_k[32] = {}, to_v[32] = {};
            wait(at.ready + 8 * (rounds & 1), rounds >> 1 & 1);
            for (int tile = reach.begin(pass * WIDE); tile < end; ++tile, ++count) {
                const u32 stage = count % STAGES, buffer = count & 1;
                const u64 queries = described(at.stages + stage * 2 * TILE), given = queries + (TILE >> 4);
                const float4 *const stat = stats + (tile * SIDE >> 1);
                u32 slopes_of[16], weights_of[16];
                float x[32], change[32];
                float2 known[8];
                wait(at.full + 8 * stage, count / STAGES & 1);
                begin_products();
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply<0>(x, keys + n * ALONG, queries + n * ALONG, n);
                commit_products();
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply<0>(change, values + n * ALONG, given + n * ALONG, n);
                commit_products();
#pragma unroll
                for (int n = 0; n < 8; ++n) known[n] = shared_pair(stat + 4 * n, 0);
                await_products<1>();
                settle(x);
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    x[i] = exp2_of(x[i] * work.scale - (i & 1 ? known[i / 4].y : known[i / 4].x));
                }
                if (!reach.whole(tile, key)) {
                    hide(x, reach, key + 16 * warp + (lane >> 2), tile * SIDE + 2 * (lane & 3));
                }
                narrow(x, weights_of);
                begin_products();
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_onto(to_v, weights_of + 4 * n, given + n * DOWN);
                commit_products();
#pragma unroll
                for (int n = 0; n < 8; ++n) known[n] = shared_pair(stat + 4 * n, 8);
                await_products<1>();
                settle(change);
#pragma unroll
                for (int i = 0; i < 32; ++i) x[i] *= change[i] - (i & 1 ? known[i / 4].y : known[i / 4].x);
                narrow(x, slopes_of);
                wait(at.used + 8 * buffer, count >> 1 & 1 ^ 1);
                put<true>(at.between + (buffer * MAKERS + maker) * TILE, slopes_of, warp, lane);
                show_to_copies();
                __syncwarp();
                if (lane == 0) arrive(at.made + 8 * buffer);
                begin_products();
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_onto(to_k, slopes_of + 4 * n, queries + n * DOWN);
                commit_products();
            }
            await_products<0>();
            settle(to_k);
            settle(to_v);
            if (key >= work.length) continue;
            // Both leave by the place of the values, which are this maker's alone.
            u32 narrowed[16];
            if (SUMS) add_rows(to_v, sums + SIDE, lane);
            narrow(to_v, narrowed);
            sync_group(maker);
            put<false>(for_v, narrowed, warp, lane);
            show_to_copies();
            sync_group(maker);
            if (own == 0) {
                store(&dv, for_v, key, head, row);
                commit_stores();
            }
#pragma unroll
            for (int i = 0; i < 32; ++i) to_k[i] *= work.slope;
            turn_back(to_k, work, row, key + 16 * warp + (lane >> 2), lane);
            if (SUMS) add_rows(to_k, sums, lane);
            narrow(to_k, narrowed);
            if (own == 0) await_reads();
            sync_group(maker);
            put<false>(for_v, narrowed, warp, lane);
            show_to_copies();
            sync_group(maker);
            if (own == 0) {
                store(&dk, for_v, key, head, row);
                commit_stores();
                await_reads();
            }
            __syncwarp();
        }
        if (SUMS) {
            __syncwarp();
            for (int i = lane; i < 2 * SIDE; i += 32) {
                line_of(work, row, head, 4 * maker + warp, 1 + i / SIDE)[i % SIDE] = sums[i];
            }
            __syncwarp();
        }
    }
    if (own == 0) await_stores();
}
