#!/bin/sh
# Makes the root of a diskless node at $NEWROOT. All that is decided here is who is asked: moor-agent brings up the network, finds its
# members, and makes the root. Returns when it is there; else the machine reboots, after a shell if the site allows one.

type getarg > /dev/null 2>&1 || . /lib/dracut-lib.sh

# The kernel that runs after a crash (kdump), with the command line of the one before: what memory there is is for the dump, and to the TPM
# the boot stage is closed. What saves a dump comes after this: a unit (Fedora's kdump-utils, a newer kdump of openSUSE) or a hook (an older one).
if [ -e /proc/vmcore ]; then
    for tool in /usr/lib/systemd/system/kdump-capture.service /usr/lib/systemd/system/kdump-save.service /lib/dracut/hooks/*/*dump*.sh; do
        [ ! -e "$tool" ] || exit 0
    done
    echo "moor: a crash kernel, and nothing in its initramfs saves the dump (/proc/vmcore); rebooting in 10 s"
    sleep 10
    reboot -f
    # Where there is no such program, or it fails. Never on to the agent.
    echo b > /proc/sysrq-trigger
    while :; do sleep 60; done
fi

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
