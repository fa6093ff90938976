//! Reads tar streams as layers of images have them: ustar, pax, GNU's extensions, sparse files in all four notations.
//!
//! The fields of a header are read by the `tar` crate. Its own reading of whole archives will not do for layers: it takes
//! a newline for the end of a pax record, which binary capabilities may well contain, reads extensions of any length
//! into memory, and does not know sparse files of pax. Where archives can be read in more than one way, the way is that
//! of Go's `archive/tar`, because that is what made the layer, and what the other tools see in it.

use std::io::{self, BufRead, BufReader, Read, Seek, Write};

use anyhow::{Context, Result, bail, ensure};
use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use crate::bounded::shown;

/// The unit of the format, in bytes.
const BLOCK: usize = 512;

/// The longest extension (long name, pax records) that is read, in bytes: the limit of Go's reader.
const MAX_EXTENSION: u64 = 1 << 20;

/// The most pieces that a sparse file may have.
const MAX_PIECES: usize = 1 << 18;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// A member, without its content.
#[derive(Debug, PartialEq, Eq)]
pub struct Member {
    /// What it is.
    pub kind: Kind,
    /// As it is in the archive: it may well be hostile.
    pub path: Vec<u8>,
    /// What a link points to.
    pub link: Vec<u8>,
    /// The length of the file, holes included.
    pub size: u64,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Seconds since the epoch, and nanoseconds.
    pub mtime: (i64, u32),
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes, names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The pieces of a sparse file, offset and length; their content follows one another in the archive.
    pub pieces: Option<Vec<(u64, u64)>>,
}

/// What an archive is read from.
pub trait Input: BufRead {
    /// Goes on `len` bytes further on. It is an error when there are not so many, now or at the next read.
    fn pass(&mut self, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let n = match self.fill_buf() {
                Ok([]) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "truncated")),
                Ok(bytes) => usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                Err(e) => return Err(e),
            };
            self.consume(n);
            len -= n as u64;
        }
        Ok(())
    }
}

/// Skips by seeking, which costs nothing.
impl<R: Read + Seek> Input for BufReader<R> {
    fn pass(&mut self, len: u64) -> io::Result<()> {
        // What is beyond the end shows when something should be there.
        let len = i64::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        self.seek_relative(len)
    }
}

/// A tar stream; reading from it gives the content of the current member.
pub struct Archive<R> {
    inner: R,
    /// Where in the stream it is.
    pos: u64,
    /// How much of the content of the current member is to come.
    content: u64,
    /// How much of it and its padding is to come.
    left: u64,
}

/// What extensions say of the next member.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extensions {
    /// The value of a pax record; an empty one says nothing.
    fn get(&self, key: &str) -> Option<&[u8]> {
        let value = self.pax.iter().rev().find(|(k, _)| k == key.as_bytes())?;
        Some(value.1.as_slice()).filter(|v| !v.is_empty())
    }

    fn number(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        Ok(Some(decimal(value).with_context(|| format!("pax {key}: not a number"))?))
    }
}

impl<R: Input> Archive<R> {
    /// Reads the archive that `inner` begins with.
    pub fn new(inner: R) -> Self {
        Self { inner, pos: 0, content: 0, left: 0 }
    }

    /// Where in the stream the content of the current member begins, or goes on.
    pub fn position(&self) -> u64 {
        self.pos
    }

    /// Writes the next `len` bytes of the content to `out`.
    pub fn copy(&mut self, mut len: u64, out: &mut impl Write) -> io::Result<()> {
        while len > 0 {
            let most = usize::try_from(self.content.min(len)).unwrap_or(usize::MAX);
            let bytes = match self.inner.fill_buf() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                bytes => bytes?,
            };
            let n = bytes.len().min(most);
            if n == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "truncated"));
            }
            out.write_all(&bytes[..n])?;
            self.inner.consume(n);
            self.advance(n);
            len -= n as u64;
        }
        Ok(())
    }

    fn advance(&mut self, n: usize) {
        self.pos += n as u64;
        self.content -= n as u64;
        self.left -= n as u64;
    }

    /// What it reads from, wherever that is now.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The next member; none at the end of the archive.
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                ensure!(!extended, "ends between an extension and what it extends");
                return Ok(None);
            };
            let size = or_zero(&header.as_old().size, header.entry_size()).context("size")?;
            match header.entry_type() {
                EntryType::GNULongName => extensions.path = Some(text(&self.extension(size)?)),
                EntryType::GNULongLink => extensions.link = Some(text(&self.extension(size)?)),
                EntryType::XHeader => extensions.pax = records(&self.extension(size)?)?,
                // Of the whole archive; Go does not apply it either.
                EntryType::XGlobalHeader => {
                    self.extension(size)?;
                    continue;
                }
                _ => return self.member(&header, size, &extensions).map(Some),
            }
            extended = true;
        }
    }

    /// The next header, checked; none at the end.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        if !self.block(header.as_mut_bytes())? {
            return Ok(None);
        }
        if header.as_bytes().iter().all(|&b| b == 0) {
            // The end is two blocks of zeros; the second may be missing, but nothing else may follow.
            let more = self.block(header.as_mut_bytes())?;
            ensure!(!more || header.as_bytes().iter().all(|&b| b == 0), "something follows the end");
            return Ok(None);
        }
        let bytes = header.as_bytes().iter().enumerate();
        // The checksum itself counts as blanks.
        let sum = bytes.map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) }).sum::<u32>();
        ensure!(header.cksum().ok() == Some(sum), "not a tar header: wrong checksum");
        Ok(Some(header))
    }

    /// Reads a whole block; false at the end.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut have = 0;
        while have < BLOCK {
            match self.inner.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(false),
                Ok(0) => bail!("truncated"),
                Ok(n) => {
                    have += n;
                    self.pos += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Goes to the end of the current member.
    fn skip(&mut self) -> Result<()> {
        self.inner.pass(self.content)?;
        match self.inner.pass(self.left - self.content) {
            // Some tools end with the last content; Go does not mind, and digests show what is missing.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            passed => passed?,
        }
        self.pos += self.left;
        (self.content, self.left) = (0, 0);
        Ok(())
    }

    /// Makes `size` bytes the content that is read next.
    fn begin(&mut self, size: u64) -> Result<()> {
        self.left = size.checked_next_multiple_of(BLOCK as u64).context("size: too large")?;
        self.content = size;
        Ok(())
    }

    /// The content of an extension.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        ensure!(size <= MAX_EXTENSION, "an extension of {size} bytes: more than {MAX_EXTENSION}");
        self.begin(size)?;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn member(&mut self, header: &Header, size: u64, extensions: &Extensions) -> Result<Member> {
        let sparse = Sparse::of(extensions)?;
        let named = extensions.path.as_deref().or_else(|| extensions.get("path"));
        let named = extensions.get("GNU.sparse.name").filter(|_| sparse != Sparse::No).or(named);
        let path = named.map_or_else(|| name_in(header), <[u8]>::to_vec);
        let link = extensions.link.as_deref().or_else(|| extensions.get("linkpath"));
        let link = link.map_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned(), Vec::from);
        let at = || format!("member {:?}", shown(&path));
        ensure!(!path.contains(&0) && !link.contains(&0), "{}: a name with a zero byte", at());
        let kind = match header.entry_type().as_byte() {
            // Before there were directories in archives, this made one.
            0 | b'0' if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => bail!("{}: unknown type {:?}", at(), char::from(other)),
        };
        // What else has a size has no content all the same.
        let stored = match kind {
            Kind::File => extensions.number("size").with_context(at)?.unwrap_or(size),
            _ => 0,
        };
        self.begin(stored).with_context(at)?;
        let pieces = match sparse {
            _ if kind != Kind::File => None,
            _ if header.entry_type() == EntryType::GNUSparse => Some(self.old_sparse(header)),
            Sparse::No => None,
            Sparse::Records(size) => Some(pax_pieces(extensions).map(|pieces| (pieces, size))),
            Sparse::InContent(size) => Some(self.map_in_content().map(|pieces| (pieces, size))),
        };
        let pieces = pieces.transpose().and_then(|p| p.map(|p| checked(p, self.content)).transpose());
        let (pieces, size) = match pieces.with_context(at)? {
            Some((pieces, size)) => (Some(pieces), size),
            None => (None, stored),
        };
        let id = |key, field: io::Result<u64>| -> Result<u32> {
            let id = extensions.number(key)?.map_or(field, Ok).with_context(|| key.to_string())?;
            // The highest stands for "leave it as it is" where owners are set.
            u32::try_from(id)
                .ok()
                .filter(|&id| id != u32::MAX)
                .with_context(|| format!("{key} {id}: too large"))
        };
        let device = |number: io::Result<Option<u32>>| number.map(Option::unwrap_or_default);
        Ok(Member {
            kind,
            size,
            mode: or_zero(&header.as_old().mode, header.mode()).context("mode").with_context(at)? & 0o7777,
            uid: id("uid", or_zero(&header.as_old().uid, header.uid())).with_context(at)?,
            gid: id("gid", or_zero(&header.as_old().gid, header.gid())).with_context(at)?,
            mtime: match extensions.get("mtime") {
                Some(text) => time(text).context("pax mtime: not a time").with_context(at)?,
                None => {
                    let mtime = or_zero(&header.as_old().mtime, header.mtime());
                    // Before 1970 it is negative, in two's complement.
                    (mtime.context("mtime").with_context(at)? as i64, 0)
                }
            },
            device: match kind {
                Kind::CharDevice | Kind::BlockDevice => (
                    device(header.device_major()).with_context(at)?,
                    device(header.device_minor()).with_context(at)?,
                ),
                _ => (0, 0),
            },
            xattrs: (extensions.pax.iter())
                .filter_map(|(key, value)| {
                    Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone()))
                })
                .collect(),
            pieces,
            path,
            link,
        })
    }

    /// The pieces of GNU's own sparse files: four in the header, then 21 in each further block.
    fn old_sparse(&mut self, header: &Header) -> Result<(Vec<(u64, u64)>, u64)> {
        let gnu = header.as_gnu().context("a sparse file without a GNU header")?;
        let mut pieces = Vec::new();
        let mut add = |from: &[GnuSparseHeader]| -> Result<()> {
            for piece in from.iter().filter(|piece| !piece.is_empty()) {
                pieces.push((piece.offset()?, piece.length()?));
            }
            ensure!(pieces.len() <= MAX_PIECES, "sparse: more than {MAX_PIECES} pieces");
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            ensure!(self.block(block.as_mut_bytes())?, "truncated");
            add(block.sparse())?;
            more = block.is_extended();
        }
        Ok((pieces, gnu.real_size()?))
    }

    /// The pieces of pax sparse files of version 1.0: lines of numbers before the content, padded to whole blocks.
    fn map_in_content(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut buffered = [0; BLOCK];
        let mut at = BLOCK;
        let mut line = || -> Result<u64> {
            let mut digits = Vec::new();
            loop {
                if at == BLOCK {
                    self.read_exact(&mut buffered).context("sparse: no map")?;
                    at = 0;
                }
                at += 1;
                match buffered[at - 1] {
                    b'\n' => return decimal(&digits).context("sparse: not a number"),
                    digit => digits.push(digit),
                }
                ensure!(digits.len() <= 20, "sparse: not a number");
            }
        };
        let count = line()?;
        ensure!(count <= MAX_PIECES as u64, "sparse: more than {MAX_PIECES} pieces");
        (0..count).map(|_| Ok((line()?, line()?))).collect()
    }
}

impl<R: Input> Read for Archive<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.content).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buf[..len])?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "truncated"));
        }
        self.advance(n);
        Ok(n)
    }
}

/// Where pax says that the map of a sparse file is, and how long the file is.
#[derive(PartialEq, Eq)]
enum Sparse {
    No,
    Records(u64),
    InContent(u64),
}

impl Sparse {
    fn of(extensions: &Extensions) -> Result<Self> {
        let version = (extensions.get("GNU.sparse.major"), extensions.get("GNU.sparse.minor"));
        let size = || -> Result<u64> {
            let size = match extensions.number("GNU.sparse.realsize")? {
                Some(size) => Some(size),
                None => extensions.number("GNU.sparse.size")?,
            };
            size.context("a sparse file without its size")
        };
        Ok(match version {
            (Some(b"1"), Some(b"0")) => Self::InContent(size()?),
            (Some(b"0"), Some(b"0" | b"1")) => Self::Records(size()?),
            (None, None)
                if extensions.get("GNU.sparse.map").is_some()
                    || extensions.get("GNU.sparse.offset").is_some()
                    || extensions.get("GNU.sparse.numblocks").is_some() =>
            {
                Self::Records(size()?)
            }
            (None, None) => Self::No,
            _ => bail!("a sparse file of an unknown version"),
        })
    }
}

/// The pieces in pax records: one list (version 0.1), or a record for each number (0.0).
fn pax_pieces(extensions: &Extensions) -> Result<Vec<(u64, u64)>> {
    let number = |text: &[u8]| decimal(text).context("sparse: not a number");
    if let Some(map) = extensions.get("GNU.sparse.map") {
        let numbers: Vec<_> = map.split(|&b| b == b',').map(number).collect::<Result<_>>()?;
        let (pairs, rest) = numbers.as_chunks::<2>();
        ensure!(rest.is_empty(), "sparse: an offset without a length");
        return Ok(pairs.iter().map(|&[offset, len]| (offset, len)).collect());
    }
    let all = |key: &[u8]| -> Result<Vec<u64>> {
        extensions.pax.iter().filter(|(k, _)| k == key).map(|(_, v)| number(v)).collect()
    };
    let (offsets, lengths) = (all(b"GNU.sparse.offset")?, all(b"GNU.sparse.numbytes")?);
    ensure!(offsets.len() == lengths.len(), "sparse: an offset without a length");
    Ok(offsets.into_iter().zip(lengths).collect())
}

/// Pieces that are in order, within the file of `size` bytes, and as long together as what is `stored`.
fn checked((pieces, size): (Vec<(u64, u64)>, u64), stored: u64) -> Result<(Vec<(u64, u64)>, u64)> {
    let (mut end, mut total) = (0, 0u64);
    for &(offset, len) in &pieces {
        ensure!(offset >= end, "sparse: pieces overlap, or are out of order");
        end = offset.checked_add(len).filter(|&end| end <= size).context("sparse: a piece beyond the end")?;
        total += len;
    }
    ensure!(total == stored, "sparse: pieces of {total} bytes, but {stored} are stored");
    Ok((pieces, size))
}

/// The records of a pax header: `LENGTH KEY=VALUE\n`, the length that of all of it.
fn records(mut bytes: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let record = (bytes.iter().position(|&b| b == b' '))
            .and_then(|blank| Some((blank, usize::try_from(decimal(&bytes[..blank])?).ok()?)))
            .and_then(|(blank, len)| bytes.get(blank + 1..len)?.strip_suffix(b"\n").map(|r| (r, len)));
        let (record, len) = record.context("pax: not a record")?;
        let equals = record.iter().position(|&b| b == b'=').context("pax: not a record")?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = &bytes[len..];
    }
    Ok(records)
}

/// The path in a header. Go before 1.8 wrote the prefix of ustar into headers of GNU's format, where the times of access and
/// change have their place. As Go has done since, what is in that place is a prefix when it is no times.
fn name_in(header: &Header) -> Vec<u8> {
    let name = header.path_bytes().into_owned();
    let Some(gnu) = header.as_gnu() else { return name };
    let is_time = |field: &[u8], time: io::Result<u64>| field[0] == 0 || or_zero(field, time).is_ok();
    if is_time(&gnu.atime, gnu.atime()) && is_time(&gnu.ctime, gnu.ctime()) {
        return name;
    }
    match text(&header.as_bytes()[345..500]) {
        prefix if prefix.is_ascii() && !prefix.is_empty() => [&prefix[..], b"/", &name].concat(),
        _ => name,
    }
}

/// A number field, which may be blank.
fn or_zero<N: Default>(field: &[u8], number: io::Result<N>) -> io::Result<N> {
    if field.iter().all(|b| matches!(b, 0 | b' ')) { Ok(N::default()) } else { number }
}

/// Up to the first zero byte.
fn text(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|&b| b == 0).next().unwrap_or_default().to_vec()
}

fn decimal(text: &[u8]) -> Option<u64> {
    // Not `parse` alone, which takes a sign.
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

/// Seconds since the epoch with a fraction, as pax has them; the fraction counts forwards from whole seconds.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, digits) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let dot = digits.iter().position(|&b| b == b'.');
    let (whole, fraction) = dot.map_or((digits, &[][..]), |dot| (&digits[..dot], &digits[dot + 1..]));
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0, |n, i| n * 10 + u32::from(fraction.get(i).copied().unwrap_or(b'0') - b'0'));
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"12.0000000019"), Some((12, 1)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-3"), Some((-3, 0)));
        for text in ["", "-", ".5", "+1", "1.x", "--1", "99999999999999999999"] {
            assert_eq!(time(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn pax_records_may_hold_anything() {
        let found = records(b"11 a=b\nc=d\n5 x=\n").unwrap();
        assert_eq!(found, [(b"a".to_vec(), b"b\nc=d".to_vec()), (b"x".to_vec(), b"".to_vec())]);
        for bad in
            [&b"5 a=b\n"[..], b"7 a=b\n", b"x a=b\n", b" a=b\n", b"6 abc\n", b"99999999999999999999 a=b\n"]
        {
            assert!(records(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pieces() {
        assert!(checked((vec![(0, 5), (5, 5), (100, 0)], 100), 10).is_ok());
        for (pieces, size, stored) in [
            (vec![(0, 5), (4, 5)], 100, 10),
            (vec![(96, 5)], 100, 5),
            (vec![(u64::MAX, 5)], 100, 5),
            (vec![(0, 5)], 100, 6),
        ] {
            assert!(checked((pieces, size), stored).is_err());
        }
    }
}
