#!/bin/sh
# Makes the root of a diskless node at $NEWROOT. All that is decided here is who is asked: moor-agent brings up the network, finds its
# members, and makes the root. Returns when it is there; else the machine reboots, after a shell if the site allows one.

type getarg > /dev/null 2>&1 || . /lib/dracut-lib.sh

# Out of the unit that this may run in: the root's server is started from here, and systemd ends what is left of a unit. systemd takes
# what it finds at the top into its own scope, which it never ends.
for top in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
    [ ! -w "$top/cgroup.procs" ] || echo $$ > "$top/cgroup.procs" || true
done

# Network and TPM drivers are loaded as devices are found.
udevadm settle --timeout=10
# These have no device of their own to be found by.
for module in fuse loop squashfs overlay zram af_packet; do
    modprobe -q "$module" || true
done

/usr/bin/moor-agent boot --root "$NEWROOT" && exit 0

# panic=: nobody gets a shell, as with the kernel's own panic. A negative number means at once.
if delay=$(getarg panic=); then
    [ "$delay" -gt 0 ] 2> /dev/null && sleep "$delay"
else
    # The emergency hook closes the boot stage before a shell is shown; what is closed opens by a cold reboot only.
    emergency_shell -n moor "moor-agent made no root file system: its last lines above say why. Leaving this shell reboots."
fi
reboot -f
# Where there is no such program, or it fails.
echo b > /proc/sysrq-trigger
