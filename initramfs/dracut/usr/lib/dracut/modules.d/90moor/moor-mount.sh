#!/bin/sh
# Without systemd in the initramfs, dracut's own loop sources this until something is mounted at $NEWROOT.

if [ "$root" = moor ]; then
    NEWROOT="$NEWROOT" /usr/sbin/moor-root
fi
