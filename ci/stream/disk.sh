# shellcheck shell=bash
# The metal disk images, with 512 and with 4096-byte sectors, and what each platform changes in them.
#
# Two ways to the same disk. By default nothing is mounted and nobody need be root:
# mkfs.xfs copies the files in (-p), debugfs edits the boot partition. A protofile
# knows no hard links and keeps the files of a directory together, so there all
# objects lie in one directory, in package order, and the deployment consists of
# symlinks to them. With --mount the kernel does it, as for real releases: objects in
# 256 directories written package by package, hard links, and the traces that
# mounting leaves in the superblocks and logs of each platform's image.

readonly MIB=$((1 << 20))

# Start and size of each partition in MiB. Small systems get smaller partitions than
# real ones, as every raw image costs time for its zeros. The root partition has room
# for log, inodes and directories.
plan_partitions() {
    ESP_START=2 ESP_SIZE=127 BOOT_SIZE=384
    ROOT_SIZE=$(($(du -sm "$WORK/root" | cut -f 1) * 6 / 5 + 96))
    if [ "$CONTENT_MB" -lt 100 ]; then
        ESP_SIZE=32 BOOT_SIZE=64
    elif [ $ROOT_SIZE -lt 320 ]; then
        ROOT_SIZE=320
    fi
    BOOT_START=$((ESP_START + ESP_SIZE))
    ROOT_START=$((BOOT_START + BOOT_SIZE))
    METAL_SIZE=$((ROOT_START + ROOT_SIZE + 1))
    [ $METAL_SIZE -le "$(($(numfmt --from=iec "$DISK_SIZE") / MIB))" ] || die "the system needs a disk of $METAL_SIZE MiB at least"
}

# A UUID that depends on the release and on what it is for, nothing else.
uuid_for() {
    printf '%s %s' "$VERSION" "$1" | sha256sum |
        sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-4\3-8\4-\5/'
}

partition_table() {
    cat <<TABLE
label: gpt
label-id: 00000000-0000-4000-A000-000000000001
unit: sectors
sector-size: $1
1 : start=$((MIB / $1)), size=$((MIB / $1)), type=21686148-6449-6E6F-744E-656564454649, name=BIOS-BOOT, uuid=$(uuid_for bios)
2 : start=$((ESP_START * MIB / $1)), size=$((ESP_SIZE * MIB / $1)), type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=EFI-SYSTEM, uuid=$(uuid_for esp)
3 : start=$((BOOT_START * MIB / $1)), size=$((BOOT_SIZE * MIB / $1)), type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=boot, uuid=$(uuid_for boot)
4 : start=$((ROOT_START * MIB / $1)), size=$((ROOT_SIZE * MIB / $1)), type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root, uuid=$(uuid_for root)
TABLE
}

# fdisk rather than sfdisk: only it takes a sector size for a file.
write_partition_table() {
    local disk=$1 sector=$2
    partition_table "$sector" >"$disk.table"
    printf 'I\n%s\nw\n' "$disk.table" | fdisk -w always -W always -b "$sector" "$disk" >"$disk.log" 2>&1
    [ "$(fdisk -b "$sector" -l "$disk" 2>/dev/null | grep -c "^$disk")" -eq 4 ] || die "fdisk: $(cat "$disk.log")"
    rm "$disk.table" "$disk.log"
}

put_partition() { # FILE DISK START-MIB
    dd if="$1" of="$2" bs=1M seek="$3" conv=notrunc,sparse status=none
    rm "$1"
}

make_esp() {
    local image=$1 sector=$2 efi=$WORK/root/$DEPLOYMENT/usr/lib/bootupd/updates/EFI
    truncate -s $((ESP_SIZE * MIB)) "$image"
    mkfs.vfat -S "$sector" -n EFI-SYSTEM -i 7B7795E7 --invariant "$image" >/dev/null
    mcopy -Q -s -i "$image" "$efi" ::/
}

# The boot tree, as the boot partition and (later) the live system hold it.
make_boot_tree() {
    local boot=$1 modules=$WORK/root/$DEPLOYMENT/usr/lib/modules/$KERNEL_VERSION
    mkdir -p "$boot"/{efi,grub2,loader.1/entries,"ostree/$OSTREE"}
    ln -s loader.1 "$boot/loader"
    ln -s . "$boot/boot"
    cp "$modules/vmlinuz" "$boot/ostree/$OSTREE/vmlinuz-$KERNEL_VERSION"
    cp "$modules/initramfs.img" "$boot/ostree/$OSTREE/initramfs-$KERNEL_VERSION.img"
    sha256sum <"$modules/vmlinuz" >"$boot/ostree/$OSTREE/.vmlinuz-$KERNEL_VERSION.hmac"
    touch "$boot/ignition.firstboot"
    printf 'set pager=1\nblscfg\n' >"$boot/grub2/grub.cfg"
    cat >"$boot/loader.1/entries/ostree-1.conf" <<ENTRY
title Fedora Linux $VERSION (CoreOS) (ostree:0)
version 1
options $(kernel_arguments) ostree=/ostree/boot.1/fedora-coreos/${OSTREE##*-}/0
linux /ostree/$OSTREE/vmlinuz-$KERNEL_VERSION
initrd /ostree/$OSTREE/initramfs-$KERNEL_VERSION.img
ENTRY
    find "$boot" -exec touch -h -d "@$EPOCH" {} +
}

kernel_arguments() {
    # shellcheck disable=SC2016  # a variable of GRUB's
    echo 'rw $ignition_firstboot mitigations=auto,nosmt'
}

make_boot() {
    local image=$1 sector=$2
    local -a blocks=()
    [ "$sector" -eq 512 ] || blocks=(-b 4096)
    truncate -s $((BOOT_SIZE * MIB)) "$image"
    E2FSPROGS_FAKE_TIME=$EPOCH mke2fs -q -t ext4 -L boot -U "$(uuid_for boot-fs)" "${blocks[@]}" \
        -E hash_seed="$(uuid_for hash)",root_owner=0:0 -d "$WORK/boot" "$image"
}

# A protofile for mkfs.xfs: directories nested, each closed by "$".
protofile() {
    printf '/\n0 0\nd--755 0 0\n'
    {
        (cd "$WORK/root" && find . -mindepth 1 \( -path ./ostree/repo/objects -prune -printf '%P d %m -\n' \) -o \
            -path "./$DEPLOYMENT/*" -type f -prune -o -printf '%P %y %m %l\n')
        awk -v deployment="$DEPLOYMENT" '{ sub("/", "", $1)
            print deployment "/" $2, "l", 777, "/ostree/repo/objects/" $1 }' "$WORK/links"
        printf '%s f 644 -\n' "$DEPLOYMENT/etc/os-release"
    } | sed 's,/,\x01,g' | sort -k 1,1 | sed 's,\x01,/,g' | awk -v objects="$WORK/objects.modes" '
        {
            depth = split($1, part, "/")
            for (; open >= depth; open--) print "$"
            name = part[depth]
        }
        $2 == "d" { print name, "d--" $3, 0, 0; open = depth }
        $2 == "f" { print name, "---" $3, 0, 0, "./" $1 }
        $2 == "l" { print name, "l--777", 0, 0, $4 }
        $1 == "ostree/repo/objects" {
            while ((getline line < objects) > 0) {
                split(line, object, " ")
                flat = object[2]
                sub("/", "", flat)
                print flat, "---" object[1], 0, 0, "./ostree/repo/objects/" object[2]
            }
        }
        END { for (; open >= 0; open--) print "$" }'
}

object_modes() {
    (cd "$WORK/root/ostree/repo/objects" && cut -d ' ' -f 1 "$WORK/objects" | xargs stat -c '%a %n')
}

format_root() { # IMAGE SECTOR [OPTION]...
    local image=$1 sector=$2
    shift 2
    truncate -s $((ROOT_SIZE * MIB)) "$image"
    # From the tree itself, so that the protofile needs no absolute names. The three
    # variables are how mkfs.xfs is told that less than 300 MiB is for a test only.
    (cd "$WORK/root" && TEST_DIR=. TEST_DEV=. QA_CHECK_FS=1 mkfs.xfs -q -L root -m uuid="$(uuid_for root-fs)" -s size="$sector" \
        -d file,name="$image",size="$ROOT_SIZE"m "$@")
}

make_root_from_protofile() {
    local image=$1 sector=$2
    local -a groups=()
    # A directory that grows needs a block of a group no lower than that of the inode it
    # grows for, or mkfs.xfs gives up, though others are free: with many files, one group.
    [ "$CONTENT_MB" -lt 100 ] || groups=(-d agcount=1)
    [ -e "$WORK/objects.modes" ] || object_modes >"$WORK/objects.modes"
    protofile >"$image.proto"
    format_root "$image" "$sector" "${groups[@]}" -p "$image.proto"
    rm "$image.proto"
}

make_root_mounted() {
    local image=$1 sector=$2 mnt=$1.mnt objects
    objects=$mnt/ostree/repo/objects
    format_root "$image" "$sector"
    mount_partition "$image" 0 $((ROOT_SIZE * MIB)) "$sector" "$mnt"
    mkdir -p "$objects"
    cut -c 1-2 "$WORK/objects" | sort -u | (cd "$objects" && xargs mkdir)
    # Objects first, package by package; the rest then finds them and becomes hard links.
    (cd "$WORK/root/ostree/repo/objects" && cut -d ' ' -f 1 "$WORK/objects" | tar -cf - -T - | tar -C "$objects" -xpf -)
    (cd "$WORK/root" && find . -mindepth 1 -path ./ostree/repo/objects -prune -o \
        \( -type f -path "./$DEPLOYMENT/usr/*" \) -o -print0 | sort -z |
        tar --null --no-recursion -cf - -T - | tar -C "$mnt" -xpf -)
    awk -v objects="$objects" '{ print objects "/" $1, $2 }' "$WORK/links" |
        (cd "$mnt/$DEPLOYMENT" && xargs -n 2 ln)
    unmount "$mnt"
}

# -o nouuid: several platforms' copies of one filesystem may be mounted at once.
mount_partition() { # FILE OFFSET SIZE SECTOR MOUNTPOINT
    local loop options=rw
    loop=$(losetup -f --show -o "$2" --sizelimit "$3" -b "$4" "$1")
    [ "$(blkid -p -s TYPE -o value "$loop")" != xfs ] || options=nouuid
    mkdir -p "$5"
    mount -o "$options" "$loop" "$5"
    # Gone as soon as it is unmounted.
    losetup -d "$loop"
}

unmount() {
    umount "$1"
    rmdir "$1"
}

make_metal() { # DISK SECTOR
    local disk=$1 sector=$2
    truncate -s $((METAL_SIZE * MIB)) "$disk"
    write_partition_table "$disk" "$sector"
    make_esp "$disk.esp" "$sector"
    put_partition "$disk.esp" "$disk" "$ESP_START"
    make_boot "$disk.boot" "$sector"
    put_partition "$disk.boot" "$disk" "$BOOT_START"
    if [ -n "$MOUNT" ]; then make_root_mounted "$disk.root" "$sector"; else make_root_from_protofile "$disk.root" "$sector"; fi
    put_partition "$disk.root" "$disk" "$ROOT_START"
}

# The boot loader entry and the console settings of a platform.
platform_entry() {
    sed "s/^options .*/& ignition.platform.id=$1/" "$WORK/boot/loader.1/entries/ostree-1.conf"
}

platform_console() {
    case $1 in
        qemu | metal | metal4k) ;;
        aws | gcp | azure*) printf 'serial --speed=115200\nterminal_input serial console\nterminal_output serial console\n# %s\n' "$1" ;;
        *) printf 'terminal_input console\nterminal_output console\n# %s\n' "$1" ;;
    esac
}

set_platform() { # DISK PLATFORM SECTOR
    if [ -n "$MOUNT" ]; then set_platform_mounted "$@"; else set_platform_unmounted "$@"; fi
}

set_platform_mounted() {
    local disk=$1 platform=$2 sector=$3
    mount_partition "$disk" $((ROOT_START * MIB)) $((ROOT_SIZE * MIB)) "$sector" "$disk.mnt"
    mount_partition "$disk" $((BOOT_START * MIB)) $((BOOT_SIZE * MIB)) "$sector" "$disk.mnt/boot"
    platform_entry "$platform" >"$disk.mnt/boot/loader/entries/ostree-1.conf"
    platform_console "$platform" >"$disk.mnt/boot/grub2/console.cfg"
    umount "$disk.mnt/boot"
    unmount "$disk.mnt"
}

# Times of mount and write go into the superblock, as mounting would put them there.
set_platform_unmounted() {
    local disk=$1 platform=$2 time
    time=$((EPOCH + $(cksum <<<"$platform" | cut -c 1-3)))
    platform_entry "$platform" >"$disk.entry"
    platform_console "$platform" >"$disk.console"
    E2FSPROGS_FAKE_TIME=$time debugfs -w "$disk?offset=$((BOOT_START * MIB))" >/dev/null 2>"$disk.log" <<COMMANDS
rm /loader.1/entries/ostree-1.conf
write $disk.entry /loader.1/entries/ostree-1.conf
write $disk.console /grub2/console.cfg
set_super_value mtime $time
set_super_value wtime $time
set_super_value mnt_count 1
COMMANDS
    rm "$disk.entry" "$disk.console" "$disk.log"
}
