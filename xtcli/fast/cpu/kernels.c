/* All kernels in one piece. */

#include "attention.c"
#include "crossentropy.c"
#include "decode.c"
#include "pointwise.c"
#include "slopes.c"

runtime threads;

void xt_threads(void *run, void *number, void *size) {
    threads.run = (void (*)(void (*)(void *), void *, unsigned, unsigned))run;
    threads.number = (int (*)(void))number;
    threads.size = (int (*)(void))size;
}
