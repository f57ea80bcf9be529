// Slopes of queries, keys and values of attention in a window, for heads of 64 numbers. slopes.py launches; the
// specification is fast/window.py. The other files stand in front of this one, and before them TURN, SUMS and ANGLE.
//
//   block   one row and head, an item, at a time; four groups of four warps
//   pass    128 keys, 64 a maker, and in turn all tiles of 64 queries that see them
//   makers  two: weights and their slopes, keys by queries; slopes of their keys and values are sums in registers
//   keeper  slopes of queries: their sums lie in global memory from pass to pass, in the order of registers
//   loader  asks for tiles, and of the next item for what each query knows: log2 of its sum of powers, and the product
//           of its output with the slope of that
//
// All that is added to one place is added by one block, pass after pass, so that sums are the same each time. TURN:
// slopes of queries and keys are turned back by angles, whose pairs are halves (1) or neighbours (2). SUMS: slopes are
// summed over the tokens.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    slopes(const __grid_constant__ Map q, const __grid_constant__ Map k, const __grid_constant__ Map v,
           const __grid_constant__ Map dy, const __grid_constant__ Map dq, const __grid_constant__ Map dk,
           const __grid_constant__ Map dv, const __grid_constant__ Work work) {
    extern __shared__ unsigned char memory[];
    __shared__ alignas(8) u64 barriers[STAGES + 2 * BUFFERS + 6];
    const u32 thread = threadIdx.x, group = __shfl_sync(0xFFFFFFFFu, thread / GROUP, 0), own = thread % GROUP;
    Shared at;
    at.keys = (shared_address(memory) + 1023) & ~1023u;
    at.stages = at.keys + 2 * KEYS, at.between = at.stages + STAGES * 2 * TILE;
    at.leaving = at.between + BUFFERS * MAKERS * TILE;
    at.stats = reinterpret_cast<float *>(memory + (at.leaving - shared_address(memory)) + MAKERS * TILE);
    at.sums = at.stats + 4 * work.length;
    at.full = shared_address(barriers), at.made = at.full + 8 * STAGES, at.used = at.made + 8 * BUFFERS;
    at.ready = at.used + 8 * BUFFERS, at.past = at.ready + 16, at.begun = at.past + 16, at.told = at.begun + 8;

    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) begin_barrier(at.full + 8 * stage, 1);
        for (int buffer = 0; buffer < BUFFERS; ++buffer) {
            begin_barrier(at.made + 8 * buffer, 4 * MAKERS);
            begin_barrier(at.used + 8 * buffer, 4);
        }
        for (int buffer = 0; buffer < 2; ++buffer) {
            begin_barrier(at.ready + 8 * buffer, 1);
            begin_barrier(at.past + 8 * buffer, 4 + MAKERS);
        }
        begin_barrier(at.begun, 4 * MAKERS);
        begin_barrier(at.told, 3);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    const Item first(work, blockIdx.x);
#pragma unroll 4
    for (int t = thread >> 3; t < work.length; t += THREADS / 8) {
        Asked(work, first, t, thread & 7).tell(at.stats, t, thread & 7);
    }
    __syncthreads();

    // All together take the registers of four groups of 128.
    if (group < MAKERS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
        make(work, at, dk, dv, group, own);
    } else if (group == MAKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 80;");
        keep(work, at, dq, own);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
        if (own >= 32) tell_all(work, at, own);
        if (own == 0) Loader{work, at, &q, &dy, &k, &v}.run();
    }
}
