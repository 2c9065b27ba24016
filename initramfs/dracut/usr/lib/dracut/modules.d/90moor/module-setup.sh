#!/bin/bash
# Puts into every initramfs that dracut makes what a diskless boot needs: the agent, the network root, and the kernel modules of both.
# A root on a disk goes on working: without boot=moor or root=moor nothing of this runs.

check() {
    return 0
}

depends() {
    echo base kernel-modules
}

installkernel() {
    # The root: FUSE, loop device, squashfs, overlay, memory disk, and the compressions that the last two may be asked for.
    hostonly='' instmods fuse loop squashfs overlay zram ext4 \
        zstd lzo lzo-rle lz4 lz4hc deflate 842 \
        crc32c_generic crc32c_intel crc32c-intel libcrc32c crc16 mbcache jbd2
    # The identity, and the machine's own data.
    hostonly='' instmods "=drivers/char/tpm" dmi-sysfs efivarfs
    # The network: raw packets for DHCP, VLANs, and every wired adapter. dracut has a module for these, but Debian packs it with a DHCP
    # client that nothing here needs.
    hostonly='' instmods af_packet 8021q virtio_pci virtio_mmio virtio_rng virtio_console xen-netfront \
        "=drivers/net/ethernet" "=drivers/net/phy" "=drivers/net/mdio"
    hostonly='' dracut_instmods -o -P '.*/(wireless|isdn|uwb|net/ethernet|net/phy|net/team)/.*' \
        -s 'eth_type_trans|register_virtio_device|usbnet_open' "=drivers/net"
}

install() {
    local program unit
    for program in /usr/bin/moor-agent /usr/bin/moor-tether; do
        if [[ ! -x $dracutsysrootdir$program ]]; then
            dfatal "moor: '$program' is not in this image: lay in the node's files again"
            exit 1
        fi
    done
    # With the libraries that a program is linked to.
    inst_multiple /usr/bin/moor-agent /usr/bin/moor-tether modprobe udevadm sleep
    if ! inst_multiple mke2fs; then
        dfatal "moor: mke2fs is not in this image: install e2fsprogs"
        exit 1
    fi
    inst_multiple -o /etc/mke2fs.conf reboot
    # The TPM's device library is opened by name at run time, so no link tells of it.
    inst_libdir_file "libtss2-tcti-device.so*"

    inst_script "$moddir/moor-root.sh" /usr/sbin/moor-root
    inst_hook emergency 00 "$moddir/moor-close-stage.sh"
    inst_hook cmdline 90 "$moddir/moor-cmdline.sh"
    if dracut_module_included "systemd"; then
        unit=$systemdsystemunitdir
        inst_simple "$moddir/moor-root.service" "$unit/moor-root.service"
        mkdir -p "$initdir$unit/initrd-root-fs.target.requires"
        ln_r "$unit/moor-root.service" "$unit/initrd-root-fs.target.requires/moor-root.service"
        # A root shell for whoever asks for it on the kernel command line, before anything could close the boot stage.
        mkdir -p "$initdir/etc/systemd/system"
        ln -sf /dev/null "$initdir/etc/systemd/system/debug-shell.service"
    else
        inst_hook mount 90 "$moddir/moor-mount.sh"
    fi
}
