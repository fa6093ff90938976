//! The outer compression of a published file, of which only the inside is wanted.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::zlib::{Inflate, Stop, crc32};
use crate::bytes::{le16, le32, le64};
use crate::decompress;
use crate::io::{SparseWriter, scratch_file};
use crate::source::{File, Source};

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all, or its name does not say so.
    None,
    /// `.xz`: one or more xz streams.
    Xz,
    /// `.gz`: one or more gzip members.
    Gzip,
    /// `.zip`: an archive of exactly one member.
    Zip,
    /// `.zst`: one or more zstd frames.
    Zstd,
}

/// A file without its outer compression.
pub struct Peeled {
    /// What is inside: an unnamed file with holes for zeros, or the file itself if it was not compressed.
    pub form: Arc<dyn Source>,
    /// The name of the one member of a zip archive.
    pub member: Option<String>,
    /// What was peeled off.
    pub compression: Compression,
}

/// Input and output are handled in parts of this length.
const PART: usize = 1 << 18;

impl Compression {
    /// The compression that the suffix of a file name tells.
    pub fn of_name(name: &str) -> Self {
        match name.rsplit_once('.').map(|(_, suffix)| suffix) {
            Some("xz") => Self::Xz,
            Some("gz") => Self::Gzip,
            Some("zip") => Self::Zip,
            Some("zst") => Self::Zstd,
            _ => Self::None,
        }
    }

    fn magic(self) -> &'static [u8] {
        match self {
            Self::None => b"",
            Self::Xz => b"\xfd7zXZ\0",
            Self::Gzip => super::gzip::MAGIC,
            Self::Zip => b"PK\x03\x04",
            Self::Zstd => b"\x28\xb5\x2f\xfd",
        }
    }
}

fn bad(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// Takes the outer compression off `file`, whose published name is `name`. The suffix of the name decides, and the file
/// must begin as that compression does. Checksums are checked. It is an error when anything follows the compressed data, or when
/// more than `max_len` bytes come out. The plain bytes go to an unnamed file in `scratch`.
pub fn peel(file: std::fs::File, name: &str, scratch: &Path, max_len: u64) -> io::Result<Peeled> {
    peel_file(file, name, scratch, max_len)
        .map_err(|e| io::Error::new(e.kind(), format!("uncompress {name}: {e}")))
}

fn peel_file(file: std::fs::File, name: &str, scratch: &Path, max_len: u64) -> io::Result<Peeled> {
    let compression = Compression::of_name(name);
    let len = file.metadata()?.len();
    let mut magic = vec![0; compression.magic().len().min(len as usize)];
    file.read_exact_at(&mut magic, 0)?;
    if magic != compression.magic() {
        return Err(bad(format!("expected {compression:?} data, found something else")));
    }
    if compression == Compression::None {
        return Ok(Peeled { form: Arc::new(File::new(file)?), member: None, compression });
    }
    let mut out = Limited { out: SparseWriter::new(scratch_file(scratch)?), left: max_len, max_len };
    let mut member = None;
    match compression {
        Compression::None => {}
        Compression::Xz => {
            copy(decompress::xz(BufReader::with_capacity(PART, file))?, &mut out)?;
        }
        Compression::Zstd => {
            copy(decompress::zstd(BufReader::with_capacity(PART, file))?, &mut out)?;
        }
        Compression::Gzip => gunzip(&file, len, &mut out)?,
        Compression::Zip => member = Some(unzip(&file, len, &mut out)?),
    }
    Ok(Peeled { form: Arc::new(File::new(out.out.finish()?)?), member, compression })
}

/// A writer that takes no more than a limit.
struct Limited {
    out: SparseWriter,
    left: u64,
    max_len: u64,
}

impl Write for Limited {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.len() as u64 > self.left {
            return Err(bad(format!("more than {} bytes inside, which is the limit", self.max_len)));
        }
        self.left -= buf.len() as u64;
        self.out.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn copy(mut from: impl Read, to: &mut Limited) -> io::Result<()> {
    let mut buf = vec![0; PART];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buf[..n])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Decodes with `decoder` from `pos` of `file`, up to `end` at most. Gives where its stream ended.
fn inflate(
    decoder: &mut Inflate,
    file: &std::fs::File,
    mut pos: u64,
    end: u64,
    mut out: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<u64> {
    let (mut input, mut output) = (vec![0; PART], vec![0; PART]);
    loop {
        let part = &mut input[..(end - pos).min(PART as u64) as usize];
        file.read_exact_at(part, pos)?;
        let step = decoder.run(part, &mut output, false)?;
        out(&output[..step.produced])?;
        pos += step.consumed as u64;
        if step.stop == Stop::End {
            return Ok(pos);
        }
        if step.consumed == 0 && step.produced == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the compressed data is cut short"));
        }
    }
}

/// Decodes gzip members up to the end of the file.
fn gunzip(file: &std::fs::File, len: u64, out: &mut Limited) -> io::Result<()> {
    let mut decoder = Inflate::gzip()?;
    let mut pos = 0;
    while pos < len {
        decoder.reset()?;
        pos = inflate(&mut decoder, file, pos, len, |bytes| out.write_all(bytes))
            .map_err(|e| io::Error::new(e.kind(), format!("gzip member at {pos}: {e}")))?;
    }
    Ok(())
}

/// The one member of a zip archive.
pub(super) struct Member {
    name: String,
    /// Where its data starts and ends in the file.
    pub(super) start: u64,
    pub(super) stop: u64,
    /// How it is compressed.
    pub(super) method: u16,
    pub(super) plain_len: u64,
    crc: u32,
}

/// Member data that is not compressed.
pub(super) const ZIP_STORED: u16 = 0;
/// Member data that is a deflate stream.
pub(super) const ZIP_DEFLATE: u16 = 8;

/// Finds the one member of a zip archive. What counts is the central directory, as in APPNOTE.TXT: a local header that
/// was written to a pipe does not know the lengths.
pub(super) fn zip_member(file: &std::fs::File, len: u64) -> io::Result<Member> {
    /// The record at the end, without its comment; its 64-bit form and the locator of that; the two headers.
    const END: usize = 22;
    const END_64: u64 = 56;
    const LOCATOR: u64 = 20;
    const CENTRAL: u64 = 46;
    const LOCAL: u64 = 30;
    let read = |at: u64, n: u64, what: &str, magic: &[u8]| -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; n as usize];
        if at.checked_add(n).is_none_or(|end| end > len) {
            return Err(bad(format!("zip: the {what} at {at} is not inside the file")));
        }
        file.read_exact_at(&mut bytes, at)?;
        if bytes.starts_with(magic) { Ok(bytes) } else { Err(bad(format!("zip: no {what} at {at}"))) }
    };
    // A comment of up to 64 KiB may follow; its length must lead to the end of the file.
    let tail_at = len.saturating_sub(END as u64 + 0xffff);
    let tail = read(tail_at, len - tail_at, "end", b"")?;
    let found = (0..tail.len().saturating_sub(END - 1)).rev().find(|&i| {
        tail[i..].starts_with(b"PK\x05\x06") && i + END + usize::from(le16(&tail, i + 20)) == tail.len()
    });
    let end = found.ok_or_else(|| bad("zip: no end of the central directory at the end of the file"))?;
    let mut members = u64::from(le16(&tail, end + 10));
    let mut central_at = u64::from(le32(&tail, end + 16));
    if members == 0xffff || central_at == 0xffff_ffff {
        let at = (tail_at + end as u64).saturating_sub(LOCATOR);
        let locator = read(at, LOCATOR, "locator", b"PK\x06\x07")?;
        let end = read(le64(&locator, 8), END_64, "64-bit end", b"PK\x06\x06")?;
        (members, central_at) = (le64(&end, 32), le64(&end, 48));
    }
    if members != 1 {
        return Err(bad(format!("zip: expected one member, found {members}")));
    }
    let central = read(central_at, CENTRAL, "central header", b"PK\x01\x02")?;
    let name_len = u64::from(le16(&central, 28));
    let names = read(central_at + CENTRAL, name_len + u64::from(le16(&central, 30)), "name", b"")?;
    let (name, mut extra) = names.split_at(name_len as usize);
    let mut plain_len = u64::from(le32(&central, 24));
    let mut folded_len = u64::from(le32(&central, 20));
    let mut local_at = u64::from(le32(&central, 42));
    // Of the three, those that do not fit stand in the extra field 1, in this order.
    while extra.len() >= 4 {
        let size = usize::from(le16(extra, 2));
        let field = extra.get(4..4 + size).ok_or_else(|| bad("zip: an extra field is cut short"))?;
        if le16(extra, 0) == 1 {
            let mut values = field.chunks_exact(8).map(|value| le64(value, 0));
            for value in [&mut plain_len, &mut folded_len, &mut local_at] {
                if *value == 0xffff_ffff {
                    *value = values.next().ok_or_else(|| bad("zip: a 64-bit length is missing"))?;
                }
            }
        }
        extra = &extra[4 + size..];
    }
    let (flags, method) = (le16(&central, 8), le16(&central, 10));
    if flags & 1 != 0 {
        return Err(bad("zip: the member is encrypted"));
    }
    let local = read(local_at, LOCAL, "local header", b"PK\x03\x04")?;
    let start = local_at + LOCAL + u64::from(le16(&local, 26)) + u64::from(le16(&local, 28));
    let stop = start.checked_add(folded_len).filter(|&stop| stop <= central_at);
    let stop = stop.ok_or_else(|| bad("zip: the member reaches into the central directory"))?;
    let name =
        String::from_utf8(name.to_vec()).map_err(|_| bad("zip: the name of the member is not UTF-8"))?;
    Ok(Member { name, start, stop, method, plain_len, crc: le32(&central, 16) })
}

/// Decodes the one member of a zip archive and gives its name.
fn unzip(file: &std::fs::File, len: u64, out: &mut Limited) -> io::Result<String> {
    let Member { name, start, stop, method, plain_len, crc: wanted } = zip_member(file, len)?;
    let (mut crc, mut made) = (0, 0);
    let mut check = |bytes: &[u8]| {
        crc = crc32(crc, bytes);
        made += bytes.len() as u64;
        out.write_all(bytes)
    };
    match method {
        ZIP_STORED => {
            let mut buf = vec![0; PART];
            let mut pos = start;
            while pos < stop {
                let part = &mut buf[..(stop - pos).min(PART as u64) as usize];
                file.read_exact_at(part, pos)?;
                check(part)?;
                pos += part.len() as u64;
            }
        }
        ZIP_DEFLATE => {
            let mut decoder = Inflate::new(super::zlib::Wrap::Raw)?;
            let end = inflate(&mut decoder, file, start, stop, check)?;
            if end != stop {
                return Err(bad(format!("zip: the member ends at {end}, expected {stop}")));
            }
        }
        other => return Err(bad(format!("zip: compression method {other} is not known"))),
    }
    if crc != wanted || made != plain_len {
        return Err(bad(format!(
            "zip: expected {plain_len} bytes with CRC {wanted:08x}, found {made} with {crc:08x}"
        )));
    }
    Ok(name)
}
