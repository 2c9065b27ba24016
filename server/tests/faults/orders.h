/* What a test tells a member's library (shim.rs). */
#ifndef ORDERS_H
#define ORDERS_H

#include <stdint.h>

/* As the test writes it; all zero, nothing is changed. */
struct orders {
    /* So long a sync takes longer, in milliseconds. */
    volatile int64_t slow;
    /* So many seconds the clock is wrong. */
    volatile int64_t clock;
    /* From when a database is opened. More than 0: it is in the memory of this process, and dies with it; a sync writes it to its place if the last
     * one that did was so many milliseconds ago, and else only says so. With 1 every sync does. */
    volatile int64_t lies;
};

extern const struct orders *orders __attribute__((visibility("hidden")));

/* Puts slow disk and wrong clock before a program in Go (go.c), with the environment as it is on the stack. */
void begin_go(char **environment) __attribute__((visibility("hidden")));

#endif
