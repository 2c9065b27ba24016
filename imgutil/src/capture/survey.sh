# What imgutil capture asks a node: its file systems and what they lie on. Reads only; $1 is the root of the system that is captured.
# Runs in the shell of any node, so: POSIX sh, and each tool only where it is there.
root=${1%/}
section() { printf '\n=== %s\n' "$1"; }
has() { command -v "$1" > /dev/null 2>&1; }

section machine
uname -m
section os-release
cat "$root/etc/os-release" 2> /dev/null || cat "$root/usr/lib/os-release"
section mounts
findmnt --json --list --bytes --nofsroot --output TARGET,SOURCE,FSROOT,FSTYPE,OPTIONS,UUID,LABEL,SIZE,USED
section devices
columns=NAME,KNAME,TYPE,SIZE,FSTYPE,UUID,LABEL,PTTYPE,PARTTYPE,PARTUUID,PARTLABEL,MOUNTPOINT,MODEL
lsblk --json --bytes --paths --output "$columns,PTUUID,PARTFLAGS" 2> /dev/null || lsblk --json --bytes --paths --output "$columns"
section starts
for start in /sys/class/block/*/start; do
    [ -e "$start" ] || continue
    device=${start%/start}
    printf '%s %s\n' "${device##*/}" "$(cat "$start")"
done
if has lvs; then
    section lvm
    lvs --reportformat json --units b --nosuffix -a -o lv_name,vg_name,lv_uuid,lv_size,segtype,pool_lv,stripes,stripe_size,chunk_size,vg_extent_size
fi
if has mdadm; then
    for array in /dev/md[0-9]* /dev/md/*; do
        [ -b "$array" ] || continue
        section "md $(readlink -f "$array")"
        mdadm --detail --export "$array"
    done
fi
if has cryptsetup; then
    for name in /dev/mapper/*; do
        [ -b "$name" ] || continue
        status=$(cryptsetup status "${name##*/}" 2> /dev/null) || continue
        section "crypt $(readlink -f "$name")"
        # Kind and cipher; no key is shown.
        printf '%s\n' "$status" | grep -E '^ *(type|cipher|keysize|sector size):'
    done
fi
if has btrfs; then
    findmnt --noheadings --list --types btrfs --output TARGET | sort -u | while read -r mount; do
        section "btrfs $mount"
        # All of the file system, by their paths from its top.
        btrfs subvolume list -a -t "$mount" 2> /dev/null
        btrfs filesystem df "$mount" 2> /dev/null
    done
fi
section packages
if [ -d "$root/var/lib/dpkg" ] && has dpkg-query; then
    dpkg-query --admindir="$root/var/lib/dpkg" -W -f '${db:Status-Abbrev}|${Package}|${Version}|${Architecture}\n' | sed -n 's/^ii *|//p'
elif has rpm; then
    rpm --root "${root:-/}" -qa --qf '%{NAME}|%|EPOCH?{%{EPOCH}:}:{}|%{VERSION}-%{RELEASE}|%{ARCH}\n'
fi
section kernels
ls "$root/lib/modules" 2> /dev/null
section boot
ls "$root/boot" 2> /dev/null
section end
