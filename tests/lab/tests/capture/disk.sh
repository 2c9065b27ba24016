# Makes the disk of a machine that runs Debian from it. $1: lvm or plain, $2: a root tree, $3: the disk's file, $4: a folder that has the
# keys `host`, `login.pub` and `personal`, and gets `secrets`, the list of what no image may have.
#
# Runs in a mount namespace of its own. The host has no device-mapper, and needs none: LVM only writes down where its volumes lie, each
# file system is made in a file of its own, and all are copied to their places. Every tool that leaves its mark is the tree's, so that the
# machine understands what it finds.
set -eu
layout=$1 tree=$2 disk=$3 work=$4
export LVM_SUPPRESS_FD_WARNINGS=1
mount -t tmpfs tmpfs "$tree/run"
mount -t proc proc "$tree/proc"
mount --rbind /sys "$tree/sys"
mount --rbind /dev "$tree/dev"
mount --bind "$work" "$tree/mnt"
in_tree() { chroot "$tree" "$@" > "$work/said" 2>&1 || { cat "$work/said" >&2; exit 1; }; }
uuid() { echo "6d6f6f72-0000-4000-8000-0000000000$1"; }
# A file system: its name, its size, how it is made.
make() {
    truncate -s "$2" "$work/$1.fs"
    name=$1
    shift 2
    in_tree "$@" "/mnt/$name.fs"
}
# Copies a file to its place on the disk, in bytes.
put() {
    dd "if=$work/$1.fs" "of=$disk" bs=1M "seek=$2" oflag=seek_bytes conv=notrunc,sparse status=none
    rm "$work/$1.fs"
}
partition() { echo $(($(partx -g -o START -n "$1" "$disk") * 512)); }
target=$work/target
mkdir "$target"

make esp 34M mkfs.vfat -n ESP -i 6d6f6f72
if [ "$layout" = lvm ]; then
    truncate -s 2G "$disk"
    sfdisk -q "$disk" << X
label: gpt
label-id: $(uuid 01)
size=34M, type=U, name=esp, uuid=$(uuid 02)
size=64M, type=L, name=boot
type=V, name=volumes
X
    make boot 64M mkfs.ext4 -q -L BOOT -U "$(uuid 0b)"
    make root 640M mkfs.ext4 -q -L ROOT -U "$(uuid 0a)"
    make home 320M mkfs.xfs -q -L HOME -m "uuid=$(uuid 0c)"
    make var 192M mkfs.ext4 -q -L VAR -U "$(uuid 0d)"
    make swap 32M mkswap -L SWAP -U "$(uuid 0e)"
    mount -o loop "$work/root.fs" "$target"
    mkdir -p "$target/boot" "$target/home" "$target/var"
    mount -o loop "$work/boot.fs" "$target/boot"
    mount -o loop "$work/home.fs" "$target/home"
    mount -o loop "$work/var.fs" "$target/var"
    fstab='/dev/mapper/vg--0-root / ext4 defaults 0 0
UUID=6d6f6f72-0000-4000-8000-00000000000b /boot ext4 defaults 0 0
/dev/mapper/vg--0-home /home xfs defaults 0 0
/dev/mapper/vg--0-var /var ext4 defaults 0 0
/dev/mapper/vg--0-swap none swap sw 0 0'
else
    truncate -s 1400M "$disk"
    sfdisk -q "$disk" << X
label: gpt
label-id: $(uuid 01)
size=34M, type=U, name=esp, uuid=$(uuid 02)
size=32M, type=S, name=swap
size=640M, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=system, attrs=GUID:59
size=192M, type=L, name=var
type=L, name=pool
X
    make swap 32M mkswap -L SWAP -U "$(uuid 0e)"
    make root 640M mkfs.ext4 -q -L ROOT -U "$(uuid 0a)"
    make var 192M mkfs.ext4 -q -L VAR -U "$(uuid 0d)"
    make pool 256M mkfs.btrfs -q -L POOL -U "$(uuid 0f)"
    mount -o loop "$work/root.fs" "$target"
    mkdir -p "$target/home" "$target/var" "$target/srv" "$work/pool"
    mount -o loop "$work/var.fs" "$target/var"
    mount -o loop "$work/pool.fs" "$work/pool"
    for name in @home @srv @home/.snapshots; do btrfs subvolume create "$work/pool/$name" > "$work/said"; done
    echo old > "$work/pool/@home/.snapshots/old"
    mount --bind "$work/pool/@home" "$target/home"
    mount --bind "$work/pool/@srv" "$target/srv"
    fstab='UUID=6d6f6f72-0000-4000-8000-00000000000a / ext4 defaults 0 0
LABEL=VAR /var ext4 defaults 0 0
LABEL=POOL /home btrfs subvol=@home 0 0
LABEL=POOL /srv btrfs subvol=@srv,compress=zstd 0 0
LABEL=SWAP none swap sw 0 0'
fi
# Filled by the machine: not every kernel knows vFAT.
mkdir -p "$target/boot/efi"

# The system, without what only takes time here: documents, languages, Python, hardware that the machine does not have.
copy() { tar --xattrs '--xattrs-include=*' "$@" -cf - | tar --xattrs '--xattrs-include=*' -xpf - -C "$target"; }
cd "$tree"
copy --one-file-system '--exclude=./mnt/*' --exclude=./boot/initrd.img-* --exclude=./boot/System.map-* --exclude=./usr/lib/modules/* --exclude=./var/cache/* --exclude=./var/lib/apt/lists/* \
    --exclude=./usr/share/doc/* --exclude=./usr/share/man/* --exclude=./usr/share/locale/* --exclude=./usr/share/i18n/* \
    --exclude=./usr/share/zoneinfo/* --exclude=./usr/lib/x86_64-linux-gnu/gconv/* --exclude=./usr/lib/x86_64-linux-gnu/libicu* \
    --exclude=./usr/lib/udev/hwdb* --exclude=./usr/lib/python3* --exclude=./usr/bin/python3* --exclude=./usr/bin/moor* .
release=$(ls usr/lib/modules)
modules="dm-thin-pool dm-crypt raid1 xfs btrfs vfat nls_cp437 nls_ascii nls_utf8 virtio_net virtio_blk algif_skcipher"
copy usr/lib/modules/*/modules.* usr/lib/modules/*/kernel/crypto usr/lib/modules/*/kernel/arch/x86/crypto \
    $(chroot . modprobe -S "$release" -a --show-depends $modules | sed -n 's,^insmod /\([^ ]*\).*,usr/\1,p' | sort -u)
cd /

printf '%s\nLABEL=ESP /boot/efi vfat umask=0077 0 0\n' "$fstab" > "$target/etc/fstab"
echo n1 > "$target/etc/hostname"
# Nothing happens on it by itself while it is captured.
rm "$target"/etc/systemd/system/timers.target.wants/*
printf '[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\n' > "$target/etc/systemd/network/10-lab.network"
mkdir -p "$target/home/op"
seq 200000 > "$target/home/op/numbers"

# What no image may have, spread over the file systems. Each holds MOOR-PLANTED or is one of the keys.
plant() {
    for path in "$@"; do
        mkdir -p "$target/${path%/*}"
        printf '%s\n' "$path" >> "$work/secrets"
        case $path in
            */.ssh/*) cp "$work/personal" "$target/$path" ;;
            *) echo "MOOR-PLANTED in $path" > "$target/$path" ;;
        esac
    done
}
plant root/.ssh/id_ed25519 root/.netrc root/.bash_history etc/apt/auth.conf home/op/.ssh/id_ed25519 home/op/.aws/credentials \
    home/op/.vault-token home/op/.python_history home/op/.local/share/keyrings/login.keyring var/log/app/app.log var/log/auth.log.1 \
    var/lib/dhcp/dhclient.eth0.leases var/lib/cloud/instance/user-data.txt var/lib/NetworkManager/secret_key var/tmp/upload \
    var/mail/op
[ "$layout" = lvm ] || plant srv/app/.ssh/id_ed25519 srv/app/.pgpass
# The machine's own: it needs its host key to be reached, and says its id.
cp "$work/host" "$target/etc/ssh/ssh_host_ed25519_key"
echo etc/ssh/ssh_host_ed25519_key >> "$work/secrets"
echo 6d6f6f72000040008000000000000099 > "$target/etc/machine-id"
cp "$work/login.pub" "$target/root/.ssh/authorized_keys"
chmod 700 "$target/root/.ssh"
chown -R 1000:1000 "$target/home/op"
umount -R "$target"
[ "$layout" = lvm ] || umount "$work/pool"

put esp "$(partition 1)"
if [ "$layout" = lvm ]; then
    put boot "$(partition 2)"
    size=$(($(partx -g -o SECTORS -n 3 "$disk") * 512))
    loop=$(losetup -f --show -o "$(partition 3)" --sizelimit "$size" "$disk")
    # Let go of at once: it ends with the descriptor, however this script ends.
    exec 9<> "$loop"
    losetup -d "$loop"
    lvm() {
        command=$1
        shift
        chroot "$tree" lvm "$command" --driverloaded n --config "devices { filter=[\"a|^$loop\$|\", \"r|.*|\"] use_devicesfile=0 }
            backup { backup=0 archive=0 } activation { monitoring=0 udev_sync=0 udev_rules=0 }" "$@" 2> "$work/said" || { cat "$work/said" >&2; exit 1; }
    }
    lvm pvcreate -q -y "$loop" > "$work/said"
    lvm vgcreate -q -y vg-0 "$loop" > "$work/said"
    for volume in root:640M home:320M var:192M swap:32M; do
        lvm lvcreate -q -y -an -Zn -Wn -n "${volume%:*}" -L "${volume#*:}" vg-0 > "$work/said"
    done
    first=$(lvm pvs --noheadings --units b --nosuffix -o pe_start)
    extent=$(lvm vgs --noheadings --units b --nosuffix -o vg_extent_size)
    for volume in root home var swap; do
        # Of `DEVICE:FIRST-LAST`, one range each: nothing else was there.
        range=$(lvm lvs --noheadings -o seg_pe_ranges "vg-0/$volume")
        range=${range#*:}
        put "$volume" $(($(partition 3) + first + ${range%-*} * extent))
    done
else
    put swap "$(partition 2)"
    put root "$(partition 3)"
    put var "$(partition 4)"
    put pool "$(partition 5)"
fi
