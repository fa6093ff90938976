//! Kernels, as the live PXE set has them. Source: `Documentation/arch/*/boot*.rst` of Linux.

use super::read::{le16, le32, text};

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
    if start.starts_with(b"\x7fELF") {
        // The machine, in the byte order of the file.
        let machine = if start[5] == 2 { le16(start, 18).swap_bytes() } else { le16(start, 18) };
        return Some(match machine {
            21 => "ELF ppc64".to_string(),
            22 => "ELF s390x".to_string(),
            62 => "ELF x86-64".to_string(),
            183 => "ELF arm64".to_string(),
            other => format!("ELF, machine {other}"),
        });
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
