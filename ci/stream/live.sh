# shellcheck shell=bash
# The live system: kernel, initramfs and rootfs for PXE, and the ISO that contains them.
# After osbuild's org.osbuild.coreos.live-artifacts.mono.

readonly ISOLINUX_DIRS='/usr/share/syslinux /usr/lib/ISOLINUX /usr/lib/syslinux/modules/bios'

# An uncompressed newc cpio; root.* must come first, as dracut looks for it at a fixed offset.
cpio_tree() {
    (cd "$1" && { find . -maxdepth 1 -name 'root.*'; find . -mindepth 1 ! -path './root.*' | sort; } |
        cpio -o -H newc -R root:root --quiet --reproducible --force-local)
}

# Linux wants what is appended to an initrd on a four-byte boundary.
align4() {
    local size
    size=$(stat -c %s "$1")
    truncate -s $(((size + 3) / 4 * 4)) "$1"
}

# The metal image's root with /boot mounted. Hard links stay hard links, so each
# content is stored once, where directory order first meets it.
live_tree() {
    local tree=$1 boot
    cp -al "$WORK/root" "$tree"
    cp -a "$WORK/boot/." "$tree/boot/"
    cp -r "$tree/$DEPLOYMENT/usr/lib/bootupd/updates/EFI" "$tree/boot/efi/"
    boot=$tree/boot/ostree/$OSTREE
    ln "$boot/vmlinuz-$KERNEL_VERSION" "$boot/.vmlinuz-$KERNEL_VERSION.hmac" "$tree/boot/"
    # A new file: the tree's is a hard link into the metal image's.
    sed '/readonly=true/d' "$WORK/root/ostree/repo/config" >"$tree/config.new"
    mv "$tree/config.new" "$tree/ostree/repo/config"
}

make_erofs() { # IMAGE TREE
    # shellcheck disable=SC2086  # commands with arguments
    TMPDIR=$WORK $MKFS_EROFS --quiet --all-root -T "$EPOCH" -U "$(uuid_for live)" $EROFS_OPTIONS "$1" "$2"
}

make_squashfs() { # IMAGE TREE COMPRESSOR
    SOURCE_DATE_EPOCH=$EPOCH mksquashfs "$2" "$1" -comp "$3" -all-root -no-recovery -no-progress -quiet >/dev/null
}

make_root_filesystem() { # DIR
    local tree=$WORK/live-tree
    live_tree "$tree"
    case $ROOTFS in
        erofs) make_erofs "$1/root.erofs" "$tree" ;;
        squashfs-*) make_squashfs "$1/root.squashfs" "$tree" "${ROOTFS#squashfs-}" ;;
    esac
    rm -r "$tree"
}

# What `coreos-installer pack osmet` leaves: the disk without what its files hold.
# Here, the beginning of the disk, up to the files of the boot partition.
make_osmet() { # SECTOR
    head -c $((BOOT_START * MIB)) "$WORK/metal-$1.raw" | xz -c6 -T1
}

make_rootfs() { # FILE
    local dir=$WORK/initrd-rootfs prefix=fedora-coreos-$VERSION
    mkdir -p "$dir/etc"
    make_root_filesystem "$dir"
    make_osmet 512 >"$dir/$prefix-metal.${ARCHES[0]}.raw.osmet"
    make_osmet 4096 >"$dir/$prefix-metal4k.${ARCHES[0]}.raw.osmet"
    echo "$VERSION" >"$dir/etc/coreos-live-rootfs"
    find "$dir" -exec touch -d "@$EPOCH" {} +
    cpio_tree "$dir" >"$1"
    align4 "$1"
    rm -r "$dir"
}

# Digests of the rootfs piece by piece, for fetching it over the network.
stream_hash() {
    local piece=$((2 * MIB))
    echo "stream-hash sha256 $piece"
    split -b $piece --filter='sha256sum | cut -c 1-64' "$1"
}

make_initramfs() { # FILE ROOTFS
    local dir=$WORK/initrd
    mkdir -p "$dir/etc/coreos"
    echo "$VERSION" >"$dir/etc/coreos-live-initramfs"
    features >"$dir/etc/coreos/features.json"
    stream_hash "$2" >"$dir/etc/coreos-live-want-rootfs"
    find "$dir" -exec touch -d "@$EPOCH" {} +
    cp "$WORK/root/$DEPLOYMENT/usr/lib/modules/$KERNEL_VERSION/initramfs.img" "$1"
    align4 "$1"
    cpio_tree "$dir" | gzip -9 >>"$1"
    align4 "$1"
    rm -r "$dir"
}

features() {
    jq -n '{"installer-config": true, "live-initrd-network": true}'
}

# A menu with an area for more kernel arguments, as `coreos-installer iso kargs` looks for it.
boot_menu() { # FORMAT
    local line
    # shellcheck disable=SC2059  # the format is ours
    line=$(printf "$1" "$(kernel_arguments | sed 's/ $ignition_firstboot//') coreos.liveiso=$VOLUME ignition.firstboot ignition.platform.id=metal")
    printf '%s%s# COREOS_KARG_EMBED_AREA\n' "$line" "$(printf '%*s' 1024 '' | tr ' ' '#')"
}

iso_boot_files() { # ISO-TREE
    local iso=$1 dir file
    for file in isolinux.bin ldlinux.c32 libcom32.c32 libutil.c32 vesamenu.c32; do
        for dir in $ISOLINUX_DIRS; do
            if [ -e "$dir/$file" ]; then cp "$dir/$file" "$iso/isolinux/"; break; fi
        done
    done
    boot_menu 'default vesamenu.c32\nlabel linux\n  kernel /images/pxeboot/vmlinuz\n  append initrd=/images/pxeboot/initrd.img,/images/ignition.img,/images/pxeboot/rootfs.img %s' >"$iso/isolinux/isolinux.cfg"
    boot_menu 'menuentry "Fedora CoreOS (Live)" {\n  initrd /images/pxeboot/initrd.img /images/ignition.img /images/pxeboot/rootfs.img\n  linux /images/pxeboot/vmlinuz %s' >"$iso/EFI/fedora/grub.cfg"
    echo '}' >>"$iso/EFI/fedora/grub.cfg"
}

make_efiboot() { # IMAGE
    local efi=$WORK/root/$DEPLOYMENT/usr/lib/bootupd/updates/EFI
    truncate -s $((8 * MIB)) "$1"
    mkfs.vfat -n EFIBOOT -i 7B7795E8 --invariant "$1" >/dev/null
    mcopy -Q -s -i "$1" "$efi" ::/
}

iso_tree() { # ISO-TREE KERNEL INITRAMFS ROOTFS
    local iso=$1
    mkdir -p "$iso"/{coreos,isolinux,images/pxeboot,EFI/fedora}
    ln "$2" "$iso/images/pxeboot/vmlinuz"
    ln "$3" "$iso/images/pxeboot/initrd.img"
    ln "$4" "$iso/images/pxeboot/rootfs.img"
    iso_boot_files "$iso"
    make_efiboot "$iso/images/efiboot.img"
    truncate -s 256K "$iso/images/ignition.img"
    truncate -s 16K "$iso/coreos/miniso.dat"
    features >"$iso/coreos/features.json"
    echo '{"file": "images/ignition.img"}' >"$iso/coreos/igninfo.json"
    grep -bo 'mitigations' "$iso/isolinux/isolinux.cfg" "$iso/EFI/fedora/grub.cfg" |
        jq -Rn --arg iso "$iso/" '{files: [inputs / ":" | {path: .[0] | ltrimstr($iso), offset: .[1] | tonumber,
            pad: "#", end: "\n"}]}' >"$iso/coreos/kargs.json"
    find "$iso" ! -path '*/pxeboot/*' -exec touch -d "@$EPOCH" {} +
}

# Stands for `coreos-installer pack minimal-iso`: what the installer needs to make
# the minimal ISO again is written over coreos/miniso.dat, inside the finished ISO.
pack_minimal_iso() { # ISO
    local sector
    sector=$(xorriso -indev "$1" -find /coreos/miniso.dat -exec report_lba 2>/dev/null |
        awk -F , '/miniso.dat/ { print $2 + 0 }')
    { printf 'coreos miniso\0'; head -c 64K "$1" | xz -c9; } | head -c 16K |
        dd of="$1" bs=2048 seek="$sector" conv=notrunc status=none
}

make_iso() { # FILE KERNEL INITRAMFS ROOTFS
    local iso=$WORK/iso
    VOLUME=fedora-coreos-$VERSION
    VOLUME=${VOLUME:0:32}
    iso_tree "$iso" "${@:2}"
    genisoimage -quiet -V "$VOLUME" -volset "fedora-coreos-$VERSION" -rational-rock -J -joliet-long \
        -eltorito-boot isolinux/isolinux.bin -eltorito-catalog isolinux/boot.cat -no-emul-boot \
        -boot-load-size 4 -boot-info-table \
        -eltorito-alt-boot -efi-boot images/efiboot.img -no-emul-boot -o "$1" "$iso"
    isohybrid --uefi "$1" 2>/dev/null
    pack_minimal_iso "$1"
    rm -r "$iso"
}

make_live() {
    local made=$WORK/made prefix arch=${ARCHES[0]} kernel initramfs rootfs iso
    prefix=fedora-coreos-$VERSION-live
    mkdir -p "$made"/live:{kernel,initramfs,rootfs,iso}
    kernel=$made/live:kernel/$prefix-kernel.$arch
    initramfs=$made/live:initramfs/$prefix-initramfs.$arch.img
    rootfs=$made/live:rootfs/$prefix-rootfs.$arch.img
    iso=$made/live:iso/$prefix-iso.$arch.iso
    cp "$WORK/root/$DEPLOYMENT/usr/lib/modules/$KERNEL_VERSION/vmlinuz" "$kernel"
    make_rootfs "$rootfs"
    make_initramfs "$initramfs" "$rootfs"
    make_iso "$iso" "$kernel" "$initramfs" "$rootfs"
    local file
    for file in "$kernel" "$initramfs" "$rootfs" "$iso"; do finish_artifact "$(dirname "$file")" "$file"; done
}
