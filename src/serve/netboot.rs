//! Booting the live system over the network: scripts for iPXE, and Ignition configs out of a directory.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use url::Url;

use super::releases::Release;
use crate::catalog::check_file_name;

/// The longest Ignition config that is served, in bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// The longest URL of an Ignition config; the kernel takes some 2000 bytes of arguments.
const MAX_URL: usize = 1024;

/// Refuses an Ignition URL that would be anything but one argument of the kernel. iPXE expands `${…}` in it, which is
/// how a config for one machine is picked: `?ignition=http://host/${mac:hexhyp}.ign`.
pub fn check_ignition_url(url: &str) -> Result<()> {
    let fit = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/?@!$'()*+,;=%{}[]&".contains(&b);
    let scheme = ["http://", "https://", "tftp://", "s3://", "gs://"].iter().any(|s| url.starts_with(s));
    ensure!(scheme && url.len() <= MAX_URL && url.bytes().all(fit), "not the URL of an Ignition config");
    Ok(())
}

/// The script that boots the live system of `release` for `arch`.
pub fn script(release: &Release, arch: &str, base: &Url, ignition: Option<&str>) -> Option<String> {
    let live = release.live();
    let [kernel, initramfs, rootfs] = live.get(arch)?;
    let dir = base.join(release.live_dir(arch)?).ok()?;
    let mut arguments = format!("initrd=main coreos.live.rootfs_url=${{base}}/{rootfs}");
    arguments += " ignition.firstboot ignition.platform.id=metal";
    if let Some(url) = ignition {
        // Writing to a string cannot fail.
        let _ = write!(arguments, " ignition.config.url={url}");
    }
    Some(format!(
        "#!ipxe\n# {} {} {arch}\nset base {dir}\nkernel ${{base}}/{kernel} {arguments}\n\
         initrd --name main ${{base}}/{initramfs}\nboot\n",
        release.stream, release.version
    ))
}

/// The script that goes on with that of the machine's own architecture, in the words of iPXE.
pub fn by_architecture(release: &Release, base: &Url, query: Option<&str>) -> Option<String> {
    let own = base.join(&format!("boot/{}/", release.stream)).ok()?;
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    Some(format!(
        "#!ipxe\nset arch ${{buildarch}}\niseq ${{arch}} i386 && set arch x86_64 ||\n\
         iseq ${{arch}} arm64 && set arch aarch64 ||\nchain {own}${{arch}}.ipxe{query}\n"
    ))
}

/// The file `name` of the directory `dir`, and its length; none where there is no such file. Links are followed as long as
/// they stay in the directory, which is how Kubernetes mounts configurations.
pub fn config(dir: &Path, name: &str) -> Result<Option<(File, u64)>> {
    if check_file_name(name).is_err() || name.starts_with('.') {
        return Ok(None);
    }
    let at = || dir.join(name).display().to_string();
    let dir = File::open(dir).with_context(|| dir.display().to_string())?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let Ok(file) = rustix::fs::openat2(&dir, name, flags, Mode::empty(), ResolveFlags::BENEATH) else {
        return Ok(None);
    };
    let file = File::from(file);
    let metadata = file.metadata().with_context(at)?;
    if !metadata.is_file() || metadata.len() > MAX_CONFIG {
        return Ok(None);
    }
    Ok(Some((file, metadata.len())))
}

/// What is in it, up to `len` bytes.
pub fn read_config(file: File, len: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignition_urls() {
        for good in ["http://h/x.ign", "https://h:1/${mac:hexhyp}?a=b&c=d", "tftp://h/x"] {
            check_ignition_url(good).unwrap();
        }
        for bad in ["", "h/x", "file:///x", "http://h/a b", "http://h/a\nboot", "http://h/\"", "http://h/ü"]
        {
            assert!(check_ignition_url(bad).is_err(), "{bad:?}");
        }
    }
}
