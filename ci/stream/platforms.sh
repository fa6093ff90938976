# shellcheck shell=bash
# From the metal disk to the published file of each platform, with the command
# lines of coreos-assembler and osbuild.

# Platform and format of every disk image, as in the documents of Fedora CoreOS.
disk_images() {
    case $1 in
        x86_64) printf '%s\n' aliyun:qcow2.xz applehv:raw.gz aws:vmdk.xz azure:vhd.xz azurestack:vhd.xz \
            digitalocean:qcow2.gz exoscale:qcow2.xz gcp:tar.gz hetzner:raw.xz hyperv:vhdx.zip \
            ibmcloud:qcow2.xz kubevirt:ociarchive metal4k:4k.raw.xz metal:raw.xz nutanix:qcow2 \
            openstack:qcow2.xz oraclecloud:qcow2.xz proxmoxve:qcow2.xz qemu:qcow2.xz virtualbox:ova \
            vmware:ova vultr:raw.xz ;;
        aarch64) printf '%s\n' applehv:raw.gz aws:vmdk.xz azure:vhd.xz gcp:tar.gz hetzner:raw.xz hyperv:vhdx.zip \
            metal4k:4k.raw.xz metal:raw.xz openstack:qcow2.xz oraclecloud:qcow2.xz qemu:qcow2.xz ;;
        ppc64le) printf '%s\n' metal4k:4k.raw.xz metal:raw.xz openstack:qcow2.xz powervs:ova.gz qemu:qcow2.xz ;;
        s390x) printf '%s\n' ibmcloud:qcow2.xz kubevirt:ociarchive metal4k:4k.raw.xz metal:raw.xz \
            openstack:qcow2.xz qemu:qcow2.xz ;;
        *) die "no such architecture: $1" ;;
    esac
}

# Where the raw disk of a platform comes from: metal as it is, the rest grown.
platform_disk() {
    local platform=$1 disk=$2 sector=512
    [ "$platform" != metal4k ] || sector=4096
    cp --sparse=always --reflink=auto "$WORK/metal-$sector.raw" "$disk"
    case $platform in
        metal | metal4k) set_platform "$disk" metal $sector ;;
        *)
            truncate -s "$DISK_SIZE" "$disk"
            set_platform "$disk" "$platform" $sector
            ;;
    esac
}

to_vmdk() { # DISK VMDK PLATFORM
    local options=adapter_type=lsilogic,compat6,subformat=streamOptimized
    [ "$3" != virtualbox ] || options=subformat=streamOptimized
    qemu-img convert -f raw -O vmdk -c -o $options "$1" "$2"
}

to_qcow2() { # DISK QCOW2 PLATFORM
    local -a compress=()
    [ "$3" != nutanix ] || compress=(-c)
    qemu-img convert -f raw -O qcow2 "${compress[@]}" -o compat=1.1 "$1" "$2"
}

ovf() { # VMDK PLATFORM
    local size capacity
    size=$(stat -c %s "$1")
    capacity=$(qemu-img info --output=json "$1" | jq '."virtual-size"')
    cat <<OVF
<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References>
    <File ovf:href="disk.vmdk" ovf:id="file1" ovf:size="$size"/>
  </References>
  <DiskSection>
    <Info>Virtual disk information</Info>
    <Disk ovf:capacity="$capacity" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <VirtualSystem ovf:id="fedora-coreos">
    <Info>fedora-coreos $VERSION for $2</Info>
    <Name>fedora-coreos</Name>
  </VirtualSystem>
</Envelope>
OVF
}

to_ova() { # DISK OVA PLATFORM
    local dir=$2.d
    mkdir "$dir"
    to_vmdk "$1" "$dir/disk.vmdk" "$3"
    ovf "$dir/disk.vmdk" "$3" >"$dir/coreos.ovf"
    tar -ch --format=ustar -C "$dir" -f "$2" coreos.ovf disk.vmdk
    rm -r "$dir"
}

# PowerVS takes the raw disk in an archive, with descriptions beside it.
to_powervs_ova() { # DISK OVA
    local dir=$2.d disk=disk.raw
    mkdir "$dir"
    ln "$1" "$dir/$disk"
    printf 'os-type = rhel\narchitecture = ppc64le\nboot-mode = 0\nvol1-file = %s\nvol1-type = boot\n' $disk >"$dir/coreos.meta"
    sed 's/disk.vmdk/disk.raw/' < <(ovf "$1" powervs) >"$dir/coreos.ovf"
    tar -ch --format=ustar -C "$dir" -f "$2" coreos.meta coreos.ovf $disk
    rm -r "$dir"
}

to_gcp_tar() { # DISK TAR
    local dir=$2.d
    mkdir "$dir"
    ln "$1" "$dir/disk.raw"
    tar -Sch --format=oldgnu -C "$dir" -f "$2" disk.raw
    rm -r "$dir"
}

blob() { # BLOBS FILE MEDIA-TYPE; prints the descriptor
    local digest
    digest=$(sha256sum <"$2" | cut -c 1-64)
    mv "$2" "$1/$digest"
    jq -cn --arg digest "sha256:$digest" --arg type "$3" --argjson size "$(stat -c %s "$1/$digest")" \
        '{digest: $digest, size: $size, mediaType: $type}'
}

to_ociarchive() { # DISK OCIARCHIVE PLATFORM STEM
    local dir=$2.d blobs=$2.d/oci/blobs/sha256 diff_id layer config manifest created
    created=$(date -u -d "@$EPOCH" +%Y-%m-%dT%H:%M:%SZ)
    mkdir -p "$dir/tree/disk" "$blobs"
    to_qcow2 "$1" "$dir/tree/disk/$4.qcow2" "$3"
    tar --sort=name --numeric-owner --format=posix --pax-option delete=atime,delete=ctime \
        -cf "$dir/layer.tar" -C "$dir/tree" disk
    rm -r "$dir/tree"
    diff_id=sha256:$(sha256sum <"$dir/layer.tar" | cut -c 1-64)
    gzip -S .compressed "$dir/layer.tar"
    layer=$(blob "$blobs" "$dir/layer.tar.compressed" application/vnd.oci.image.layer.v1.tar+gzip)
    jq -cn --arg created "$created" --arg diff "$diff_id" --arg version "$VERSION" '{created: $created, architecture: "amd64",
        os: "linux", config: {Labels: {version: $version}}, rootfs: {type: "layers", diff_ids: [$diff]},
        history: [{created: $created, created_by: "/bin/sh -c #(nop) osbuild input"}]}' >"$dir/config"
    config=$(blob "$blobs" "$dir/config" application/vnd.oci.image.config.v1+json)
    jq -cn --argjson config "$config" --argjson layer "$layer" \
        '{schemaVersion: 2, config: $config, layers: [$layer]}' >"$dir/manifest"
    manifest=$(blob "$blobs" "$dir/manifest" application/vnd.oci.image.manifest.v1+json)
    jq -cn --argjson manifest "$manifest" '{schemaVersion: 2, manifests: [$manifest]}' >"$dir/oci/index.json"
    printf '{"imageLayoutVersion": "1.0.0"}' >"$dir/oci/oci-layout"
    (cd "$dir/oci" && tar --sort=name --owner=0 --group=0 --numeric-owner --mode=go=rX,u+rw,a-s --format=posix \
        --mtime="@$EPOCH" --pax-option delete=atime,delete=ctime -cf - blobs index.json oci-layout) >"$2"
    rm -r "$dir"
}

# The platform's own format, not yet compressed. The raw disk may be used up.
convert_disk() { # DISK PLAIN PLATFORM STEM
    case $2 in
        *.raw) mv "$1" "$2" ;;
        *.qcow2) to_qcow2 "$1" "$2" "$3" ;;
        *.vmdk) to_vmdk "$1" "$2" "$3" ;;
        *.vhd) qemu-img convert -f raw -O vpc -o subformat=fixed,force_size "$1" "$2" ;;
        *.vhdx) qemu-img convert -f raw -O vhdx "$1" "$2" ;;
        *.tar) to_gcp_tar "$1" "$2" ;;
        *.ociarchive) to_ociarchive "$1" "$2" "$3" "$4" ;;
        *.ova) if [ "$3" = powervs ]; then to_powervs_ova "$1" "$2"; else to_ova "$1" "$2" "$3"; fi ;;
    esac
    rm -f "$1"
}

# In the directory of the file, as the name goes into gzip's and zip's headers.
compress() { # PLAIN SUFFIX PLATFORM
    cd "$(dirname "$1")"
    case $2 in
        *xz) xz -c"$(xz_level "$3")" -T2 "${1##*/}" >"$1.xz" ;;
        tar.gz) gzip --no-name -9 -c "${1##*/}" >"$1.gz" ;;
        *gz) gzip -6 -c "${1##*/}" >"$1.gz" ;;
        *zip) zip -q -9j - "${1##*/}" >"$1.zip" ;;
    esac
    rm "$1"
}

# Makes $WORK/made/PLATFORM.SUFFIX/ with the file, its signature and digests.
make_disk_image() { # PLATFORM:SUFFIX
    local platform=${1%%:*} suffix=${1#*:} stem dir plain disk
    stem=fedora-coreos-$VERSION-$platform.${ARCHES[0]}
    dir=$WORK/made/$1
    # 4k is part of the platform's name in the file, of the format's in the document.
    plain=$dir/$stem.${suffix#4k.}
    disk=$WORK/$platform.disk
    mkdir -p "$dir"
    platform_disk "$platform" "$disk"
    case $suffix in
        *.xz | *.gz | *.zip)
            convert_disk "$disk" "${plain%.*}" "$platform" "$stem"
            # The tar of GCP is named by its compressed form only.
            [ "$suffix" = tar.gz ] || sha256sum <"${plain%.*}" | cut -c 1-64 >"$dir/uncompressed-sha256"
            compress "${plain%.*}" "$suffix" "$platform"
            ;;
        *) convert_disk "$disk" "$plain" "$platform" "$stem" ;;
    esac
    finish_artifact "$dir" "$plain"
}
