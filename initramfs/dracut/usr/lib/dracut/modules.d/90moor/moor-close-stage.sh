#!/bin/sh
# Sourced before dracut shows a shell (rd.break=, or a failed boot): the boot stage is closed, so that whoever sits at the console cannot
# ask the members for what only a booting node may have. Where it cannot be closed there is no shell.

# The site's cpio makes an initramfs one that members answer, whatever `boot=` was changed to.
if [ "$(getarg boot=)" = moor ] || [ "$(getarg root=)" = moor ] || [ -e /etc/mooring/site.json ]; then
    # udev may not have come to it yet.
    modprobe -q -a tpm_crb tpm_tis || true
    if ! /usr/bin/moor-agent close-stage; then
        echo "moor: the boot stage cannot be closed, so no shell is shown; rebooting in 10 s"
        sleep 10
        reboot -f
        echo b > /proc/sysrq-trigger
        # Never back to what would show the shell.
        while :; do sleep 60; done
    fi
fi
