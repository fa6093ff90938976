//! The outer compression of a published file, of which only the inside is wanted.

use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::zip;
use super::zlib::{Inflate, Stop, crc32};
use crate::decompress;
use crate::io::{SparseWriter, is_zero, scratch_file};
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

    /// Whether a file that starts with these bytes, at least six unless it is shorter, may be compressed in this way.
    fn may_start_with(self, start: &[u8]) -> bool {
        match self {
            Self::None => true,
            Self::Xz => start.starts_with(b"\xfd7zXZ\0"),
            Self::Gzip => start.starts_with(super::gzip::MAGIC),
            Self::Zip => start.starts_with(b"PK\x03\x04"),
            // pzstd begins with a skippable frame.
            Self::Zstd => matches!(start, [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]),
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
    let mut start = vec![0; len.min(6) as usize];
    file.read_exact_at(&mut start, 0)?;
    if !compression.may_start_with(&start) {
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
        Compression::Zip => member = Some(unzip(&file, &mut out)?),
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

/// Decodes gzip members up to the end of the file, or to zeros that pad it, as tapes and gzip have them.
fn gunzip(file: &std::fs::File, len: u64, out: &mut Limited) -> io::Result<()> {
    let mut decoder = Inflate::gzip()?;
    let mut pos = 0;
    while pos < len && !(pos > 0 && zeros_from(file, pos, len)?) {
        decoder.reset()?;
        pos = inflate(&mut decoder, file, pos, len, |bytes| out.write_all(bytes))
            .map_err(|e| io::Error::new(e.kind(), format!("gzip member at {pos}: {e}")))?;
    }
    Ok(())
}

/// Whether there are only zeros from `pos` on.
fn zeros_from(file: &std::fs::File, mut pos: u64, len: u64) -> io::Result<bool> {
    // Short, as mostly another member follows.
    let mut buf = [0; 4096];
    while pos < len {
        let part = &mut buf[..(len - pos).min(4096) as usize];
        file.read_exact_at(part, pos)?;
        if !is_zero(part) {
            return Ok(false);
        }
        pos += part.len() as u64;
    }
    Ok(true)
}

/// The one member of a zip archive, and where its data lies.
pub(super) fn only_member(archive: &dyn Source) -> io::Result<(zip::Member, Range<u64>)> {
    let directory = zip::Directory::find(archive)?;
    let found = if directory.members == 1 { directory.read(archive, 1)?.pop() } else { None };
    let member =
        found.ok_or_else(|| bad(format!("zip: expected one member, found {}", directory.members)))?;
    if member.encrypted {
        return Err(bad("zip: the member is encrypted"));
    }
    let data = member.data(archive)?;
    Ok((member, data))
}

/// Decodes the one member of a zip archive and gives its name.
fn unzip(file: &std::fs::File, out: &mut Limited) -> io::Result<String> {
    let (zip::Member { name, method, len: plain_len, crc: wanted, .. }, data) =
        only_member(&File::new(file.try_clone()?)?)?;
    let name = String::from_utf8(name).map_err(|_| bad("zip: the name of the member is not UTF-8"))?;
    let (start, stop) = (data.start, data.end);
    let (mut crc, mut made) = (0, 0);
    let mut check = |bytes: &[u8]| {
        crc = crc32(crc, bytes);
        made += bytes.len() as u64;
        out.write_all(bytes)
    };
    match method {
        zip::STORED => {
            let mut buf = vec![0; PART];
            let mut pos = start;
            while pos < stop {
                let part = &mut buf[..(stop - pos).min(PART as u64) as usize];
                file.read_exact_at(part, pos)?;
                check(part)?;
                pos += part.len() as u64;
            }
        }
        zip::DEFLATE => {
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
