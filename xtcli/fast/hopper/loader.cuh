// The loader of slopes.cu: one thread asks for tiles, three warps for what is known of the next item's queries.

// A place in all that a block does.
struct Cursor {
    int number, pass, tile, end;
    Item item;
    __device__ __forceinline__ Cursor(const Work &work) : number(blockIdx.x), pass(0), item(work, blockIdx.x) {
        open();
    }
    __device__ __forceinline__ void open() { tile = item.begin(pass), end = item.end(pass); }
    __device__ __forceinline__ void next_pass(const Work &work) {
        if (++pass == item.passes()) pass = 0, number += gridDim.x, item = Item(work, number);
        open();
    }
    __device__ __forceinline__ void next(const Work &work) {
        if (++tile == end) next_pass(work);
    }
    __device__ __forceinline__ bool ended(const Work &work) const { return number >= work.items; }
};

struct Loader {
    const Work &work;
    const Shared &at;
    const Map *q, *dy, *k, *v;
    Ring<STAGES> stage;
    Ring<2> pair;

    __device__ __forceinline__ void queries(Cursor &ahead) {
        if (ahead.ended(work)) return;
        const u32 to = at.stages + stage.at * 2 * TILE, barrier = at.full + 8 * stage.at;
        const Item &item = ahead.item;
        expect(barrier, 2 * TILE);
        load(q, to, barrier, ahead.tile * SIDE, item.head, item.row);
        load(dy, to + TILE, barrier, ahead.tile * SIDE, item.head, item.row);
        stage.next();
        ahead.next(work);
    }

    __device__ __forceinline__ void keys(const Cursor &now) {
        if (now.ended(work)) return;
        const u32 to = at.keys + pair.at * KEYS, barrier = at.ready + 8 * pair.at;
        expect(barrier, KEYS);
        for (int maker = 0; maker < MAKERS; ++maker) {
            load(k, to + maker * TILE, barrier, now.pass * WIDE + maker * SIDE, now.item.head, now.item.row);
            load(v, to + (MAKERS + maker) * TILE, barrier, now.pass * WIDE + maker * SIDE, now.item.head, now.item.row);
        }
        pair.next();
    }

    __device__ __forceinline__ void run() {
        Cursor now(work), ahead(work);
        Ring<BUFFERS> buffer;
        keys(now);
        for (int n = 1; n < STAGES; ++n) queries(ahead);
        Cursor following = now;
        following.next_pass(work);
        keys(following);
        Ring<2> left;
        bool first = true;
        for (; !now.ended(work); buffer.next()) {
            if (now.tile == now.item.begin(now.pass) && !first) {
                wait(at.past + 8 * left.at, left.round);
                left.next();
                following = now;
                following.next_pass(work);
                keys(following);
            }
            // All makers are past the tile before.
            wait(at.made + 8 * buffer.at, buffer.round);
            queries(ahead);
            first = false;
            now.next(work);
        }
    }
};

// Four queries a warp, and as many again that are under way.
__device__ __forceinline__ void tell_all(const Work &work, const Shared &at, u32 own) {
    constexpr int AT_ONCE = 3 * 4;
    const u32 part = own & 7;
    int number = 0;
    for (int next = blockIdx.x + gridDim.x; next < work.items; next += gridDim.x, ++number) {
        const Item item(work, next);
        float *const stats = at.stats + (number + 1 & 1) * 2 * work.length;
        wait(at.begun, number & 1);
        for (int t = (own >> 3) - 4; t < work.length; t += 2 * AT_ONCE) {
            const int u = t + AT_ONCE < work.length ? t + AT_ONCE : t;
            const Asked one(work, item, t, part), two(work, item, u, part);
            one.tell(stats, t, part);
            two.tell(stats, u, part);
        }
        __syncwarp();
        if ((own & 31) == 0) arrive(at.told);
    }
}
