//! What the container image must know of the executable it carries: for which machine, and whether it runs alone.
//!
//! Layout and numbers are those of the System V ABI's ELF-64 object file format and its processor supplements.

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::Arch;

/// How many bytes from the start of an executable hold all that is looked at: the program headers follow the file
/// header, and linkers make a dozen of them, of 56 bytes each.
pub const HEAD: u64 = 64 << 10;

/// `e_type`: an executable at a fixed address, and a position-independent one.
const ET_EXEC_DYN: [u16; 2] = [2, 3];

/// `p_type` of the program header that names the dynamic loader.
const PT_INTERP: u32 = 3;

/// Gives the machine that the executable is for. `head` is its first [`HEAD`] bytes, or all of it where it is shorter.
///
/// Refuses one that needs a dynamic loader: there is none in the image.
pub fn static_executable(head: &[u8]) -> Result<Arch> {
    let short = || format!("not within the first {} bytes", head.len());
    ensure!(head.starts_with(b"\x7fELF"), "not an ELF executable");
    let ident = head.get(..64).with_context(|| format!("ELF header: {}", short()))?;
    ensure!(ident[4] == 2, "ELF class {}: only 64-bit executables (class 2) are supported", ident[4]);
    let big = match ident[5] {
        1 => false,
        2 => true,
        order => bail!("ELF byte order {order}: neither 1 (little) nor 2 (big)"),
    };
    // Both callers below pass slices of exactly the length they ask for.
    let number = |bytes: &[u8]| {
        let add = |n: u64, b: &u8| n << 8 | u64::from(*b);
        if big { bytes.iter().fold(0, add) } else { bytes.iter().rev().fold(0, add) }
    };

    let kind = number(&ident[16..18]) as u16;
    ensure!(ET_EXEC_DYN.contains(&kind), "ELF type {kind}: not an executable");
    let machine = number(&ident[18..20]);
    let arch = match (machine, big) {
        (62, false) => Arch::Amd64,
        (183, false) => Arch::ARM64,
        (21, false) => Arch::PowerPC64le,
        (22, true) => Arch::s390x,
        (243, false) => Arch::RISCV64,
        _ => bail!(
            "ELF machine {machine}: not one that the image can name (x86_64, aarch64, ppc64le, s390x, riscv64)"
        ),
    };

    let (start, size, count) = (number(&ident[32..40]), number(&ident[54..56]), number(&ident[56..58]));
    ensure!(size >= 56, "ELF program headers of {size} bytes: expected 56");
    for i in 0..count {
        let kind = start
            .checked_add(i * size)
            .and_then(|at| usize::try_from(at).ok())
            .and_then(|at| head.get(at..at.checked_add(4)?))
            .with_context(|| format!("ELF program header {i}: {}", short()))?;
        ensure!(
            number(kind) as u32 != PT_INTERP,
            "it needs a dynamic loader, and the image has none: build a static one with ci/build"
        );
    }
    Ok(arch)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header and the given program headers.
    fn elf(big: bool, machine: u16, kinds: &[u32]) -> Vec<u8> {
        let mut out = vec![0; 64 + 56 * kinds.len()];
        let mut put = |at: usize, bytes: &[u8]| {
            for (i, b) in bytes.iter().enumerate() {
                out[at + if big { bytes.len() - 1 - i } else { i }] = *b;
            }
        };
        put(16, &2u16.to_le_bytes());
        put(18, &machine.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &(kinds.len() as u16).to_le_bytes());
        for (i, kind) in kinds.iter().enumerate() {
            put(64 + 56 * i, &kind.to_le_bytes());
        }
        out[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, if big { 2 } else { 1 }]);
        out
    }

    #[test]
    fn machines() {
        assert_eq!(static_executable(&elf(false, 62, &[6, 1])).unwrap(), Arch::Amd64);
        assert_eq!(static_executable(&elf(false, 183, &[1])).unwrap(), Arch::ARM64);
        assert_eq!(static_executable(&elf(false, 21, &[1])).unwrap(), Arch::PowerPC64le);
        assert_eq!(static_executable(&elf(true, 22, &[1])).unwrap(), Arch::s390x);
        let e = static_executable(&elf(true, 21, &[1])).unwrap_err().to_string();
        assert!(e.starts_with("ELF machine 21: "), "{e}");
    }

    #[test]
    fn dynamic_is_refused() {
        for big in [false, true] {
            let machine = if big { 22 } else { 62 };
            let e = static_executable(&elf(big, machine, &[6, PT_INTERP, 1])).unwrap_err().to_string();
            assert_eq!(
                e,
                "it needs a dynamic loader, and the image has none: build a static one with ci/build"
            );
        }
    }

    #[test]
    fn hostile() {
        let whole = elf(false, 62, &[1, 1, 1]);
        for len in 0..whole.len() - 52 {
            assert!(static_executable(&whole[..len]).is_err(), "{len} bytes");
        }
        let mut far = whole.clone();
        far[32..40].fill(0xff);
        let e = static_executable(&far).unwrap_err().to_string();
        assert_eq!(e, "ELF program header 0: not within the first 232 bytes");
        let mut many = whole;
        many[56..58].fill(0xff);
        let e = static_executable(&many).unwrap_err().to_string();
        assert_eq!(e, "ELF program header 3: not within the first 232 bytes");
        assert_eq!(static_executable(b"#!/bin/sh\n").unwrap_err().to_string(), "not an ELF executable");
    }
}
