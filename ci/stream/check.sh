# shellcheck shell=bash
# Looks at a finished release with tools that had no part in making it.

# "START SIZE" of a partition, in units of 4 KiB.
partition() { # DISK SECTOR NUMBER
    fdisk -b "$2" -l -o Start,Sectors "$1" 2>/dev/null | grep -A 9 Start |
        awk -v sector="$2" -v line="$3" 'NR == line + 1 { print $1 * sector / 4096, $2 * sector / 4096 }'
}

copy_partition() { # DISK SECTOR NUMBER FILE
    local start size
    read -r start size < <(partition "$1" "$2" "$3")
    dd if="$1" of="$4" bs=4096 skip="$start" count="$size" conv=sparse status=none
}

check_disk() { # RAW-DISK SECTOR PLATFORM
    local disk=$1 sector=$2 part=$1.part
    copy_partition "$disk" "$sector" 3 "$part"
    e2fsck -fn "$part" >/dev/null 2>&1
    debugfs -R 'cat /loader/entries/ostree-1.conf' "$part" 2>/dev/null | grep -q "ignition.platform.id=$3\$"
    rm "$part"
    copy_partition "$disk" "$sector" 4 "$part"
    xfs_repair -n -f "$part" >/dev/null 2>&1
    rm "$part"
}

# A disk in a format of qemu's.
check_image() { # IMAGE PLATFORM
    qemu-img check -q "$1"
    qemu-img convert -O raw "$1" "$1.raw"
    check_disk "$1.raw" 512 "$2"
    rm "$1.raw"
}

check_file() { # FILE SCRATCH
    local file=$1 scratch=$2 platform
    gpg --batch --quiet --no-default-keyring --keyring "$scratch/key.gpg" --trust-model always \
        --verify "$file.sig" "$file" 2>/dev/null
    platform=$(sed -E 's/.*-([a-z0-9]+)\.[a-z0-9_]+\.[^/]*$/\1/' <<<"$file")
    case $file in
        *-metal.*.raw.xz) unpack xz "$file" "$scratch/disk"; check_disk "$scratch/disk" 512 metal ;;
        *-metal4k.*.raw.xz) unpack xz "$file" "$scratch/disk"; check_disk "$scratch/disk" 4096 metal ;;
        *.raw.xz) unpack xz "$file" "$scratch/disk"; check_disk "$scratch/disk" 512 "$platform" ;;
        *.raw.gz) unpack gzip "$file" "$scratch/disk"; check_disk "$scratch/disk" 512 "$platform" ;;
        *.vhd.xz) unpack xz "$file" "$scratch/disk"; check_disk "$scratch/disk" 512 "$platform" ;;
        *.qcow2) cp "$file" "$scratch/disk"; check_image "$scratch/disk" "$platform" ;;
        *.xz) unpack xz "$file" "$scratch/disk"; check_image "$scratch/disk" "$platform" ;;
        *.tar.gz) tar -xOf "$file" disk.raw >"$scratch/disk"; check_disk "$scratch/disk" 512 "$platform" ;;
        *.qcow2.gz) unpack gzip "$file" "$scratch/disk"; check_image "$scratch/disk" "$platform" ;;
        *.ova) tar -xOf "$file" disk.vmdk >"$scratch/disk"; check_image "$scratch/disk" "$platform" ;;
        *.ova.gz) tar -xOf "$file" disk.raw >"$scratch/disk"; check_disk "$scratch/disk" 512 "$platform" ;;
        *.zip) unzip -p "$file" >"$scratch/disk"; check_image "$scratch/disk" "$platform" ;;
        *.ociarchive) tar -xOf "$file" index.json | jq -e '.manifests | length == 1' >/dev/null ;;
        *.iso) xorriso -indev "$file" -find /images -exec report_lba 2>&1 | grep -q rootfs.img ;;
        *-live-rootfs.*) check_rootfs "$file" "$scratch" ;;
    esac
}

unpack() { "$1" -dc "$2" | dd of="$3" conv=sparse bs=1M iflag=fullblock status=none; }

check_rootfs() { # FILE SCRATCH
    mkdir "$2/disk.d"
    (cd "$2/disk.d" && cpio -i --quiet <"$1")
    if [ -e "$2/disk.d/root.erofs" ]; then
        # shellcheck disable=SC2086  # a command with arguments
        ${MKFS_EROFS/mkfs.erofs/fsck.erofs} --extract "$2/disk.d/root.erofs" >/dev/null
    else
        unsquashfs -q -n -d "$2/disk.d/root" "$2/disk.d/root.squashfs" >/dev/null
    fi
}

# Every digest and name in the document against the files.
check_document() {
    jq -r '.architectures[].artifacts[] | .formats[][] | "\(.sha256)  \(.location | sub(".*/(?<arch>[^/]+)/"; "\(.arch)/"))"' \
        "$OUT/stream.json" | (cd "$OUT"/builds/* && sha256sum --quiet -c)
}

check_release() {
    local scratch file failed=0
    scratch=$(mktemp -d "$OUT/.check.XXXXXX")
    gpg --batch --quiet --dearmor <"$OUT/signing-key.asc" >"$scratch/key.gpg"
    check_document || failed=1
    for file in "$OUT"/builds/*/*/*; do
        [[ $file != *.sig ]] || continue
        rm -rf "$scratch"/disk*
        # In the background, because -e has no effect in the condition of an if.
        check_file "$file" "$scratch" &
        if wait $!; then
            echo "ok    ${file##*/}"
        else
            echo "WRONG ${file##*/}"
            failed=1
        fi
    done
    rm -rf "$scratch"
    return $failed
}
