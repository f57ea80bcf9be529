/* The threads that share a piece of work: those of the OpenMP runtime that PyTorch has loaded, by its own entry points,
 * so that there are no more of them than before. */

#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    void (*run)(void (*work)(void *), void *given, unsigned threads, unsigned flags); /* GOMP_parallel */
    int (*number)(void);                                                              /* omp_get_thread_num */
    int (*size)(void);                                                                /* omp_get_num_threads */
} runtime;

extern runtime threads;

/* Where threads wait for each other. */
typedef struct {
    _Atomic int32_t arrived, round;
} meeting;

static inline void rest(int turns) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    /* Beside another program, the one that is waited for may need this very core. */
    if (turns > 2000) sched_yield();
}

/* Wait until all threads are here. */
static inline void meet(meeting *at, int size) {
    if (size == 1) return;
    const int32_t round = atomic_load_explicit(&at->round, memory_order_acquire);
    if (atomic_fetch_add_explicit(&at->arrived, 1, memory_order_acq_rel) + 1 == size) {
        atomic_store_explicit(&at->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&at->round, round + 1, memory_order_release);
        return;
    }
    for (int turns = 0; atomic_load_explicit(&at->round, memory_order_acquire) == round; turns++) rest(turns);
}

/* The number of the next piece of work, taken by nobody else. */
static inline int64_t take(_Atomic int64_t *next) { return atomic_fetch_add_explicit(next, 1, memory_order_relaxed); }
