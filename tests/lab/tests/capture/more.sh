# Gives the running machine what only its own kernel can make: a thin volume beside the others, and a file system on LUKS on a RAID 1 of
# two partitions of its second disk. A secret lies on each.
set -eu
lvcreate -q -y --type thin-pool -n pool -L 64M -c 64k vg-0
lvcreate -q -y --thin -n thin -V 200M vg-0/pool
mkfs.ext4 -q -L THIN /dev/vg-0/thin
printf 'label: gpt\nsize=48M,type=R,name=half-1\nsize=48M,type=R,name=half-2\n' | sfdisk -q /dev/vdb
udevadm settle
mdadm --quiet --create /dev/md0 --run --level=1 --raid-devices=2 --metadata=1.2 --assume-clean /dev/vdb1 /dev/vdb2
echo MOOR-PASSPHRASE | cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file - /dev/md0
echo MOOR-PASSPHRASE | cryptsetup open --key-file - /dev/md0 vault
mkfs.ext4 -q -L VAULT /dev/mapper/vault
for place in thin vault; do
    mkdir -p "/srv/$place"
    mount "LABEL=$(echo $place | tr a-z A-Z)" "/srv/$place"
    mkdir -p "/srv/$place/.ssh"
    cp /root/.ssh/id_ed25519 "/srv/$place/.ssh/id_ed25519"
    echo 'MOOR-PLANTED' > "/srv/$place/.pgpass"
    seq 1000 > "/srv/$place/numbers"
done
sync
