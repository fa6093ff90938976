# shellcheck shell=bash
# What the operating system is made of: a selection of files, laid out as ostree does.
#
# $WORK/files   paths (usr/…), package by package: the order in which objects are written
# $WORK/objects "OBJECT PATH" in the same order; a path of each content only once
# $WORK/links   "OBJECT PATH" for every path
# $WORK/root    the root filesystem: objects and, hard-linked to them, the deployment

# Paths that need no quoting in a mkfs.xfs protofile, in debugfs or in this shell.
readonly PLAIN_PATH='[A-Za-z0-9._+@%,=~/-]+'

# A fixed shuffle: packages are installed in an order that has nothing to do with
# where their files are, and the same release must come out each time.
shuffled() { sort | shuf --random-source=<(yes); }

# Every packaged path of the tree, package by package. Without a package database,
# a directory stands for a package.
package_files() {
    local root=$1
    if [ -d "$root/var/lib/dpkg/info" ]; then
        find "$root/var/lib/dpkg/info" -name '*.list' | shuffled | xargs cat
    elif command -v rpm >/dev/null && [ -d "$root/usr/lib/sysimage/rpm" ]; then
        rpm --root "$root" -qa --qf '%{NAME}\n' | shuffled | xargs rpm --root "$root" -ql
    else
        find "$root/usr" -type d | shuffled | xargs -d '\n' -I{} find {} -maxdepth 1 -printf "/usr/%P\n"
    fi | sed -E 's,^/,,; s,^(bin|sbin|lib[^/]*)/,usr/&,'
}

# World-readable files and symlinks of plain name: "TYPE SIZE PATH". Directories that
# this user may not read hold none of those, so find's complaints say nothing.
usable_files() {
    find "$1/usr" -regextype posix-extended -regex "$1/$PLAIN_PATH" \
        \( -type f -perm -004 -o -type l \) -printf '%y %s usr/%P\n' 2>/dev/null
}

# Takes packages until the size asked for is reached. No single file may take more
# than a 32nd of it, so that most files are as small as in a real system. There are at most
# as many as would fill it with 4 KiB each: tiny files take blocks and inodes, and packages
# of the host that have thousands of them must not decide whether a disk is large enough.
select_files() {
    local root=$1 bytes=$2
    package_files "$root" | awk -v budget="$bytes" '
        NR == FNR { type[$3] = $1; size[$3] = $2; next }
        full || !($1 in type) || seen[$1]++ { next }
        ++paths > budget / 4096 { full = 1; next }
        type[$1] == "l" { print; next }
        size[$1] > budget / 32 { next }
        taken + size[$1] > budget { full = 1; next }
        { taken += size[$1]; print }
    ' <(usable_files "$root") -
}

# One tar pipe for all: ostree keeps neither owner, nor time, nor odd modes.
copy_files() {
    tar -C "$1" --no-recursion --hard-dereference --owner=0 --group=0 --mtime=@0 --mode=u=rwX,go=rX \
        -cf - -T "$WORK/files" | tar -C "$2" -xpf -
}

# The initrd of the system: some of its own files, as a dracut image holds them.
make_os_initrd() {
    local deployment=$1 bytes=$2
    (cd "$deployment" && xargs -d '\n' -a "$WORK/files" stat -c '%F:%s:%n' |
        awk -F: -v budget="$bytes" '$1 == "regular file" && $3 ~ /^usr\/(lib|bin|sbin)/ &&
            taken + $2 <= budget { taken += $2; print $3 }' |
        cpio -o -H newc -R root:root --quiet --reproducible | zstd -q -10)
}

# A real kernel: the host's, or one from the distribution's archive (kept for the
# next time), or else bytes that compress as little as a kernel does.
find_kernel() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/rehydrator/kernel kernel
    for kernel in "$1"/boot/vmlinuz-* /boot/vmlinuz-* /usr/lib/modules/*/vmlinuz "$cache"/vmlinuz-*; do
        if [ -r "$kernel" ]; then echo "$kernel"; return; fi
    done
    download_kernel "$cache" >&2 || say "no kernel to be had: bytes made up instead"
    for kernel in "$cache"/vmlinuz-*; do
        if [ -r "$kernel" ]; then echo "$kernel"; return; fi
    done
    kernel=$WORK/vmlinuz-0
    xargs -d '\n' -a "$WORK/files" sh -c 'cd "$0" && cat "$@" 2>/dev/null' "$1" |
        head -c 32M | xz -6 >"$kernel" || true
    echo "$kernel"
}

download_kernel() {
    local cache=$1 unpacked package
    command -v apt-get >/dev/null || return 1
    package=$(apt-cache depends "linux-image-cloud-$(dpkg --print-architecture)" | awk '$1 == "Depends:" { print $2; exit }')
    [ -n "$package" ] || return 1
    unpacked=$WORK/kernel-package
    mkdir -p "$unpacked" "$cache"
    (cd "$unpacked" && apt-get download -q "$package" && dpkg -x ./*.deb .) || return 1
    cp "$unpacked"/boot/vmlinuz-* "$cache/"
}

# Kernel, initrd and boot loader, where the system keeps them.
add_kernel() {
    local root=$1 deployment=$2 kernel modules efi
    kernel=$(find_kernel "$root")
    KERNEL_VERSION=${kernel##*/vmlinuz-}
    [ "$KERNEL_VERSION" != "$kernel" ] || KERNEL_VERSION=$(basename "$(dirname "$kernel")")
    modules=usr/lib/modules/$KERNEL_VERSION
    efi=usr/lib/bootupd/updates/EFI/fedora
    mkdir -p "$deployment/$modules" "$deployment/$efi"
    # A kernel takes a good part of a small release's time; its head does for tests.
    head -c "$((CONTENT_SIZE / 4))" "$kernel" >"$deployment/$modules/vmlinuz"
    make_os_initrd "$deployment" $((CONTENT_SIZE / 4)) >"$deployment/$modules/initramfs.img"
    # Stand-ins for what the EFI partition holds.
    head -c 512K "$kernel" >"$deployment/$efi/shimx64.efi"
    tail -c 1536K "$kernel" >"$deployment/$efi/grubx64.efi"
    printf '%s\n' "$modules"/{vmlinuz,initramfs.img} "$efi"/{shimx64,grubx64}.efi >>"$WORK/files"
}

# "OBJECT PATH" for every regular file, in the order of packages.
hash_files() {
    (cd "$1" && while read -r path; do [ -L "$path" ] || echo "$path"; done <"$WORK/files" |
        xargs -d '\n' sha256sum) | awk '{ print substr($1, 1, 2) "/" substr($1, 3) ".file", $2 }'
}

# ostree stores a content once, and every deployed file is a hard link to it.
link_objects() {
    local deployment=$1 objects=$2
    hash_files "$deployment" >"$WORK/links"
    awk '!seen[$1]++' "$WORK/links" >"$WORK/objects"
    cut -c 1-2 "$WORK/objects" | sort -u | (mkdir -p "$objects" && cd "$objects" && xargs mkdir -p)
    awk -v objects="$objects" '{ print $2, objects "/" $1 }' "$WORK/objects" |
        (cd "$deployment" && xargs -P "$JOBS" -n 2 ln)
    awk -v objects="$objects" 'seen[$1]++ { print objects "/" $1, $2 }' "$WORK/links" |
        (cd "$deployment" && xargs -r -n 2 ln -f)
}

# What else the root filesystem holds besides objects and deployment.
add_root_files() {
    local root=$1 checksum=$2
    mkdir -p "$root"/{boot,ostree/deploy/fedora-coreos/var,"ostree/boot.1.1/fedora-coreos/$checksum"}
    ln -s boot.1.1 "$root/ostree/boot.1"
    ln -s "../../../deploy/fedora-coreos/deploy/$checksum.0" "$root/ostree/boot.1.1/fedora-coreos/$checksum/0"
    printf '[core]\nrepo_version=1\nmode=bare\n\n[sysroot]\nreadonly=true\nbootloader=none\n' >"$root/ostree/repo/config"
    printf '[origin]\ncontainer-image-reference=fedora-coreos:%s\n' "$STREAM" \
        >"$root/ostree/deploy/fedora-coreos/deploy/$checksum.0.origin"
    printf '{"build":"fedora-coreos-%s","ref":"%s","version":"%s"}\n' "$VERSION" "$STREAM" "$VERSION" \
        >"$root/.coreos-aleph-version.json"
}

make_content() {
    local content=$1 checksum deployment
    checksum=$(printf %s "$VERSION" | sha256sum | cut -c 1-64)
    OSTREE=fedora-coreos-$checksum
    DEPLOYMENT=ostree/deploy/fedora-coreos/deploy/$checksum.0
    deployment=$WORK/root/$DEPLOYMENT
    mkdir -p "$deployment/etc"
    select_files "$content" "$CONTENT_SIZE" >"$WORK/files"
    [ -s "$WORK/files" ] || die "no packaged files found under $content/usr"
    copy_files "$content" "$deployment"
    printf 'NAME="Fedora Linux"\nID=fedora\nVARIANT_ID=coreos\nOSTREE_VERSION=%s\n' "$VERSION" >"$deployment/etc/os-release"
    add_kernel "$content" "$deployment"
    link_objects "$deployment" "$WORK/root/ostree/repo/objects"
    add_root_files "$WORK/root" "$checksum"
    find "$WORK/root" -exec touch -h -d @0 {} +
    say "content: $(wc -l <"$WORK/objects") objects, $(du -sm "$WORK/root" | cut -f 1) MiB, kernel $KERNEL_VERSION"
}
