// The keeper of slopes.cu: slopes of queries.

__device__ __forceinline__ void keep(const Work &work, const Shared &at, const Map &dq, u32 own) {
    const u32 warp = own >> 5, lane = own & 31;
    float *const sums = at.sums + (4 * MAKERS * 2 + warp) * SIDE;
    float4 *const scratch =
        reinterpret_cast<float4 *>(work.scratch + static_cast<size_t>(blockIdx.x) * work.length * SIDE) + own;
    Ring<BUFFERS> buffer;
    Ring<2> pair;
    for (int number = blockIdx.x; number < work.items; number += gridDim.x) {
        const Item item(work, number);
        if (SUMS) sums[lane] = sums[lane + 32] = 0.0f;
        for (int pass = 0, passes = item.passes(); pass < passes; ++pass, pair.next()) {
            const u32 keys = at.keys + pair.at * KEYS;
            const int end = item.end(pass);
            for (int tile = item.begin(pass); tile < end; ++tile) {
                const u32 theirs = at.between + buffer.at * MAKERS * TILE;
                const bool opens = item.opens(tile) == pass, closes = item.closes(tile) == pass;
                float4 *const kept = scratch + tile * SIDE * (SIDE / 4);
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
                wait(at.made + 8 * buffer.at, buffer.round);
                begin_products();
#pragma unroll
                for (int maker = 0; maker < MAKERS; ++maker) {
                    const u64 a = described(theirs + maker * TILE), b = described(keys + maker * TILE);
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply<1>(to_q, a + n * ALONG, b + n * DOWN, 1);
                }
                commit_products();
                await_products<0>();
                settle(to_q);
                if (tile + 1 == end && lane == 0) arrive(at.past + 8 * pair.at);
                if (closes) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) to_q[i] *= work.slope;
                    turn_back(to_q, work, item.row, tile * SIDE + 16 * warp + (lane >> 2), lane);
                    if (SUMS) add_rows(to_q, sums, lane);
                    u32 narrowed[16];
                    narrow(to_q, narrowed);
                    sync_group(MAKERS);
                    put<false>(theirs, narrowed, warp, lane);
                    show_to_copies();
                    sync_group(MAKERS);
                    if (own == 0) {
                        store(&dq, theirs, tile * SIDE, item.head, item.row);
                        commit_stores();
                        await_reads();
                    }
                    __syncwarp();
                }
                if (lane == 0) arrive(at.used + 8 * buffer.at);
                if (!closes) {
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        opens ? begin_four(kept + n * GROUP, to_q + 4 * n) : add_four(kept + n * GROUP, to_q + 4 * n);
                    }
                }
                buffer.next();
            }
        }
        if (SUMS) {
            __syncwarp();
            for (int i = lane; i < SIDE; i += 32) {
                line_of(work, item, warp, 0)[i] = sums[i];
                for (int maker = 1; maker < MAKERS; ++maker) line_of(work, item, 4 * maker + warp, 0)[i] = 0.0f;
            }
            __syncwarp();
        }
    }
    if (own == 0) await_stores();
}
