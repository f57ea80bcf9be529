// Slopes of queries, keys and values of attention in a window, for heads of 64 numbers. slopes.py launches; the
// specification is fast/window.py. The other files stand in front of this one, and before them TURN, SUMS and ANGLE.
//
//   block   one row and head, an item, at a time; its last four warps are the keeper, the two groups before it makers
//   pass    128 keys, 64 a maker, and in turn all tiles of 64 queries that see them
//   maker   weights and their slopes, keys by queries; slopes of its keys and values are sums in registers
//   keeper  slopes of queries: their sums lie in global memory from pass to pass, in the order of registers. It also
//           asks for what makers need: tiles, and of the next item what each query knows: log2 of its sum of powers,
//           and the product of its output with the slope of that
//
// One thread adds to one place, pass after pass, so that sums are the same each time. TURN: queries' and keys' slopes
// are turned back by angles, whose pairs are halves (1) or neighbours (2). SUMS: slopes are summed over the tokens.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    slopes(const __grid_constant__ Map q, const __grid_constant__ Map k, const __grid_constant__ Map v,
           const __grid_constant__ Map dy, const __grid_constant__ Map dq, const __grid_constant__ Map dk,
           const __grid_constant__ Map dv, const __grid_constant__ Work work) {
    extern __shared__ unsigned char memory[];
    __shared__ alignas(8) u64 barriers[STAGES + 8];
    const u32 thread = threadIdx.x, group = __shfl_sync(0xFFFFFFFFu, thread / GROUP, 0);
    const Reach reach{work.length, work.left, work.right};
    Shared at;
    at.keys = (shared_address(memory) + 1023) & ~1023u;
    at.stages = at.keys + 2 * KEYS, at.between = at.stages + STAGES * 2 * TILE;
    at.stats = reinterpret_cast<float *>(memory + (at.between - shared_address(memory)) + 2 * MAKERS * TILE);
    at.sums = at.stats + 4 * work.length;
    at.full = shared_address(barriers), at.made = at.full + 8 * STAGES, at.used = at.made + 16, at.ready = at.used + 16;
    at.told = at.ready + 16;

    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) begin_barrier(at.full + 8 * stage, 1);
        for (int buffer = 0; buffer < 2; ++buffer) {
            begin_barrier(at.made + 8 * buffer, 4 * MAKERS);
            begin_barrier(at.used + 8 * buffer, 4);
            begin_barrier(at.ready + 8 * buffer, 1);
        }
        begin_barrier(at.told, 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    constexpr int ROWS = THREADS / 8, AT_ONCE = 4;
    for (int t = thread >> 3; t < work.length; t += ROWS * AT_ONCE) {
        Asked asked[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            if (t + n * ROWS < work.length) ask(asked[n], work, blockIdx.x, t + n * ROWS, thread & 7);
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            if (t + n * ROWS < work.length) tell(at.stats, asked[n], t + n * ROWS, thread & 7);
        }
    }
    __syncthreads();

    // Both together take the registers of three groups of 168.
    if (group == MAKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 120;");
        const int row = blockIdx.x / work.heads, head = blockIdx.x % work.heads, first = blockIdx.x;
        const Loader loader{work, reach, at, &q, &dy, &k, &v, first, 0, reach.begin(0), reach.end(0), row, head, first};
        keep(work, at, dq, loader, thread % GROUP);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
        make(work, at, dk, dv, group, thread % GROUP);
    }
}
