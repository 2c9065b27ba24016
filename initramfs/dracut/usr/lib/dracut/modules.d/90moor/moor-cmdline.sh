#!/bin/sh
# boot=moor or root=moor on the kernel command line: the root comes from the network, no disk is waited for.

if [ "$(getarg boot=)" = moor ] || [ "$root" = moor ]; then
    root=moor
    rootok=1
fi
