//! Kernels, as the live PXE set has them. Source: `Documentation/arch` of Linux.

use super::read::text;
use crate::bytes::{le16, le32};

/// What kind of kernel starts with these bytes, at least 68 KiB of them; with its version where it tells.
pub(super) fn kernel(start: &[u8]) -> Option<String> {
    if start[0x202..].starts_with(b"HdrS") {
        // The offset of the version, counted from the second sector.
        let at = usize::from(le16(start, 0x20e)) + 0x200;
        let version = start.get(at..at + 128).and_then(text);
        // The rest of the text is who built it, and when.
        let version = version.as_deref().and_then(|v| v.split(' ').next()).filter(|_| at > 0x200);
        return Some(["bzImage"].into_iter().chain(version).collect::<Vec<_>>().join(" "));
    }
    if start.starts_with(b"MZ") && start[4..].starts_with(b"zimg") {
        return Some(format!("EFI zboot, compressed with {}", text(&start[24..56]).unwrap_or_default()));
    }
    if start[56..].starts_with(b"ARM\x64") {
        return Some("arm64 Image".to_string());
    }
    if start[0x10008..].starts_with(b"S390EP") {
        return Some("s390x image".to_string());
    }
    if start.starts_with(b"MZ") {
        let pe = le32(start, 0x3c) as usize;
        return start
            .get(pe..pe.saturating_add(4))
            .filter(|s| *s == b"PE\0\0")
            .map(|_| "EFI program".to_string());
    }
    None
}

/// For which machine the ELF file is that starts with these bytes.
pub(super) fn elf(start: &[u8]) -> Option<String> {
    if !start.starts_with(b"\x7fELF") {
        return None;
    }
    // In the byte order of the file.
    let machine = if start[5] == 2 { le16(start, 18).swap_bytes() } else { le16(start, 18) };
    Some(match machine {
        21 => "ppc64".to_string(),
        22 => "s390x".to_string(),
        62 => "x86-64".to_string(),
        183 => "arm64".to_string(),
        other => format!("machine {other}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The start of a file with `fields` at their offsets.
    fn start(fields: &[(usize, &[u8])]) -> Vec<u8> {
        let mut start = vec![0; super::super::START];
        for (at, bytes) in fields {
            start[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        start
    }

    #[test]
    fn kernels_by_their_headers() {
        let bz = start(&[
            (0, b"MZ"),
            (0x202, b"HdrS"),
            (0x20e, &[0, 0x10]),
            (0x1200, b"6.1.0-56 (builder) #1 SMP\0"),
        ]);
        assert_eq!(kernel(&bz).as_deref(), Some("bzImage 6.1.0-56"));
        let no_version = start(&[(0x202, b"HdrS"), (0x20e, &[0xff, 0xff])]);
        assert_eq!(kernel(&no_version).as_deref(), Some("bzImage"));
        let zboot = start(&[(0, b"MZ\0\0zimg"), (24, b"zstd")]);
        assert_eq!(kernel(&zboot).as_deref(), Some("EFI zboot, compressed with zstd"));
        assert_eq!(kernel(&start(&[(0, b"MZ"), (56, b"ARM\x64")])).as_deref(), Some("arm64 Image"));
        assert_eq!(kernel(&start(&[(0x10008, b"S390EP")])).as_deref(), Some("s390x image"));
        assert_eq!(kernel(&start(&[(0, b"MZ"), (0x3c, &[0xff; 4])])), None);
        assert_eq!(elf(&start(&[(0, b"\x7fELF\x02\x02"), (18, &[0, 21])])).as_deref(), Some("ppc64"));
        assert_eq!(elf(&start(&[(0, b"\x7fELF\x02\x01"), (18, &[62, 0])])).as_deref(), Some("x86-64"));
    }
}
