# shellcheck shell=bash
# Signatures, the published tree and the stream document.

make_key() {
    export GNUPGHOME=$OUT/gnupg
    mkdir -m 700 "$GNUPGHOME"
    gpg --batch --quiet --passphrase '' --quick-gen-key 'CoreOS test release <coreos@example.invalid>' rsa3072 sign never 2>/dev/null
    gpg --batch --armor --export >"$OUT/signing-key.asc"
}

# Digest and signature of a published file, beside it.
finish_artifact() { # DIR FILE
    sha256sum <"$2" | cut -c 1-64 >"$1/sha256"
    gpg --batch --quiet --detach-sign --output "$1/signature" "$2"
    mv "$2" "$1/file"
    say "made $(basename "$2"), $(($(stat -c %s "$1/file") / 1000000)) MB"
}

# "MADE PLATFORM FORMAT ARTIFACT FILE-NAME" for everything an architecture publishes.
artifacts() { # ARCH
    local arch=$1 prefix=fedora-coreos-$VERSION image platform suffix
    for image in $(disk_images "$arch"); do
        platform=${image%%:*} suffix=${image#*:}
        wanted "$platform" || continue
        echo "$image ${platform%4k} $suffix disk $prefix-$platform.$arch.${suffix#4k.}"
    done
    wanted live || return 0
    echo "live:iso metal iso disk $prefix-live-iso.$arch.iso"
    echo "live:kernel metal pxe kernel $prefix-live-kernel.$arch"
    echo "live:initramfs metal pxe initramfs $prefix-live-initramfs.$arch.img"
    echo "live:rootfs metal pxe rootfs $prefix-live-rootfs.$arch.img"
}

# A file that several architectures publish was made once; only its names differ.
publish() { # ARCH; prints a JSON line for each artifact
    local arch=$1 made platform format artifact name dir=$OUT/builds/$VERSION/$1
    mkdir -p "$dir"
    while read -r made platform format artifact name; do
        made=$WORK/made/$made
        ln "$made/file" "$dir/$name"
        ln "$made/signature" "$dir/$name.sig"
        jq -cn --arg arch "$arch" --arg platform "$platform" --arg format "$format" --arg artifact "$artifact" \
            --arg location "${BASE_URL//ARCH/$arch}/$name" --arg sha256 "$(cat "$made/sha256")" \
            --arg plain "$(cat "$made/uncompressed-sha256" 2>/dev/null)" \
            '{path: [$platform, $format, $artifact], arch: $arch, value: ({location: $location,
                signature: ($location + ".sig"), sha256: $sha256}
                + if $plain == "" then {} else {"uncompressed-sha256": $plain} end)}'
    done < <(artifacts "$arch")
}

stream_document() {
    jq -s --indent 4 --arg version "$VERSION" --arg stream "$STREAM" --arg time "$(date -u -d "@$EPOCH" +%Y-%m-%dT%H:%M:%SZ)" '
        def sorted: to_entries | sort_by(.key) | from_entries;
        def region($n): {release: $version, image: ("ami-0123456789abcdef" + $n)};
        def name($arch): "fedora-coreos-" + ($version + "-gcp-" + $arch | gsub("[._]"; "-"));
        def images($arch):
            (if $arch == "x86_64" or $arch == "aarch64" then
                {aws: {regions: {"eu-central-1": region("0"), "us-east-1": region("1"), "us-west-2": region("2")}},
                 gcp: {release: $version, project: "fedora-coreos-cloud", family: ("fedora-coreos-" + $stream), name: name($arch)}}
             else {} end)
            + if $arch == "x86_64" or $arch == "s390x" then
                {kubevirt: {release: $version, image: ("quay.io/fedora/fedora-coreos-kubevirt:" + $stream),
                    "digest-ref": ("quay.io/fedora/fedora-coreos-kubevirt@sha256:" + "5" * 64)}}
              else {} end;
        def platforms: reduce .[] as $a ({}; .[$a.path[0]].release = $version |
            .[$a.path[0]].formats[$a.path[1]][$a.path[2]] = $a.value) | map_values(.formats |= sorted) | sorted;
        {stream: $stream, metadata: {"last-modified": $time, generator: "fedora-coreos-stream-generator v0.2.19"},
         architectures: (group_by(.arch) | map({key: .[0].arch, value: {artifacts: platforms, images: images(.[0].arch)}})
            | from_entries)}'
}
