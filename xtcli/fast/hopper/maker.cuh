// A maker of slopes.cu: weights, their slopes, and the slopes of keys and values.

// Begin d = a b of a whole tile.
__device__ __forceinline__ void begin_tile(float (&d)[32], u64 a, u64 b) {
    begin_products();
#pragma unroll
    for (int n = 0; n < 4; ++n) multiply<0>(d, a + n * ALONG, b + n * ALONG, n);
    commit_products();
}

// Begin d = d + a b with a in registers.
__device__ __forceinline__ void begin_onto(float (&d)[32], const u32 (&a)[16], u64 b) {
    begin_products();
#pragma unroll
    for (int n = 0; n < 4; ++n) multiply_onto(d, a + 4 * n, b + n * DOWN);
    commit_products();
}

__device__ __forceinline__ void make(const Work &work, const Shared &at, const Map &dk, const Map &dv, u32 maker,
                                     u32 own) {
    const u32 warp = own >> 5, lane = own & 31, leaving = at.leaving + maker * TILE;
    float *const sums = at.sums + (4 * maker + warp) * 2 * SIDE;
    Ring<STAGES> stage;
    Ring<BUFFERS> buffer;
    Ring<2> pair;
    u32 number = 0;
    float x[32], change[32];
    wait(at.ready, 0);
    wait(at.full, 0);
    begin_tile(x, described(at.keys + maker * TILE), described(at.stages));
    await_products<0>();
    for (int next = blockIdx.x; next < work.items; ++number) {
        const Item item(work, next);
        next += gridDim.x;
        const float *const stats = at.stats + (number & 1) * 2 * work.length + 4 * (lane & 3);
        if (number > 0) wait(at.told, number - 1 & 1);
        if (lane == 0) arrive(at.begun);
        if (SUMS) {
            for (int i = lane; i < 2 * SIDE; i += 32) sums[i] = 0.0f;
            __syncwarp();
        }
        for (int pass = 0, passes = item.passes(); pass < passes; ++pass) {
            const int key = pass * WIDE + maker * SIDE, begin = item.begin(pass), end = item.end(pass);
            const u32 place = at.keys + maker * TILE;
            const u32 keys = place + pair.at * KEYS, coming = place + (pair.at ^ 1) * KEYS;
            u64 queries = described(at.stages + stage.at * 2 * TILE);
            u32 slopes_of[16] = {};
            float to_k[32] = {}, to_v[32] = {};
            for (int tile = begin; tile < end; ++tile) {
                const u64 before = queries, given = described(at.stages + stage.at * 2 * TILE + TILE);
                const u32 stat = shared_address(stats + 2 * SIDE * tile);
                const bool turns = tile + 1 == end;
                u32 weights_of[16];
                float2 known[8];
                queries = given - (TILE >> 4);
#pragma unroll
                for (int n = 0; n < 8; ++n) known[n] = shared_pair(stat + 64 * n);
                await_products<0>();
                settle(x);
                // While weights are made: their slopes, and what the tile before leaves to the keys (at first none).
                begin_tile(change, described(keys + MAKERS * TILE), given);
                begin_onto(to_k, slopes_of, before);
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    x[i] = exp2_of(x[i] * work.scale - (i & 1 ? known[i / 4].y : known[i / 4].x));
                }
                if (!item.whole(tile, key)) {
                    hide(x, item, key + 16 * warp + (lane >> 2), tile * SIDE + 2 * (lane & 3));
                }
                narrow(x, weights_of);
                begin_onto(to_v, weights_of, given);
#pragma unroll
                for (int n = 0; n < 8; ++n) known[n] = shared_pair(stat + 64 * n + 8);
                await_products<1>();
                settle(change);
#pragma unroll
                for (int i = 0; i < 32; ++i) x[i] *= change[i] - (i & 1 ? known[i / 4].y : known[i / 4].x);
                narrow(x, slopes_of);
                // What the pass before has left is read, and so its keys' and values' places are this maker's no more. Said
                // before anything of the next pass is waited for: this tile may be the pass' only one.
                if (tile == begin && own == 0) {
                    await_reads();
                    if (number > 0 || pass > 0) arrive(at.past + 8 * (pair.at ^ 1));
                }
                __syncwarp();
                // The next tile's scores are made while slopes are handed over; behind the last one they are of no use.
                stage.next();
                if (!turns || pass + 1 < passes || next < work.items) {
                    if (turns) wait(at.ready + 8 * (pair.at ^ 1), pair.round ^ pair.at);
                    wait(at.full + 8 * stage.at, stage.round);
                }
                begin_tile(x, described(turns ? coming : keys), described(at.stages + stage.at * 2 * TILE));
                wait(at.used + 8 * buffer.at, buffer.round ^ 1);
                put<true>(at.between + (buffer.at * MAKERS + maker) * TILE, slopes_of, warp, lane);
                show_to_copies();
                __syncwarp();
                if (lane == 0) arrive(at.made + 8 * buffer.at);
                buffer.next();
            }
            begin_onto(to_k, slopes_of, queries);
            pair.next();
            await_products<0>();
            settle(to_k);
            settle(to_v);
            if (key >= work.length) continue;
            // Slopes of values leave by the values' place, which is this maker's alone.
            const u32 values = keys + MAKERS * TILE;
            u32 narrowed[16];
            sync_group(maker);
            if (SUMS) add_rows(to_v, sums + SIDE, lane);
            narrow(to_v, narrowed);
            put<false>(values, narrowed, warp, lane);
#pragma unroll
            for (int i = 0; i < 32; ++i) to_k[i] *= work.slope;
            turn_back(to_k, work, item.row, key + 16 * warp + (lane >> 2), lane);
            if (SUMS) add_rows(to_k, sums, lane);
            narrow(to_k, narrowed);
            put<false>(leaving, narrowed, warp, lane);
            show_to_copies();
            sync_group(maker);
            if (own == 0) {
                store(&dv, values, key, item.head, item.row);
                store(&dk, leaving, key, item.head, item.row);
                commit_stores();
            }
            __syncwarp();
        }
        if (SUMS) {
            __syncwarp();
            for (int i = lane; i < 2 * SIDE; i += 32) {
                line_of(work, item, 4 * maker + warp, 1 + i / SIDE)[i % SIDE] = sums[i];
            }
            __syncwarp();
        }
    }
    await_products<0>();
    if (own == 0) await_stores();
}
