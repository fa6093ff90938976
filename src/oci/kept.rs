//! What was fetched of an image, within a bound.
//!
//! ```text
//! blob ─► all of it once, hashed as a whole and in pieces ─► pieces in one unnamed file, those used last
//!                                        a piece that is not there any more ─► fetched again, and compared
//! ```
//!
//! So no byte is ever given that is not of a blob whose digest was right, however little is kept, and whatever a
//! registry says the second time.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::digest::{Digest, Hasher};
use crate::io::scratch_file;
use crate::source::{Source, check_range};

/// What is fetched again at once, in bytes: enough that a request for it is cheap.
pub(super) const PIECE: u64 = 1 << 20;

/// Gives `len` bytes of what is fetched, from an offset on.
pub(super) type Fetch = dyn Fn(u64, u64) -> io::Result<Box<dyn Read + Send>> + Send + Sync;

/// Pieces of all that was fetched.
pub(super) struct Kept {
    /// How many are kept at most.
    limit: u64,
    state: Mutex<State>,
}

/// A piece: of which file, and which one.
type Key = (u64, u64);

#[derive(Default)]
struct State {
    /// Made when it is needed.
    file: Option<File>,
    /// Where each piece is, and when it was used.
    places: HashMap<Key, (u64, u64)>,
    /// The pieces by when they were used.
    used: BTreeMap<u64, Key>,
    clock: u64,
    /// Places that nothing is at, of as many as were made.
    free: Vec<u64>,
    made: u64,
    /// How many files were fetched.
    files: u64,
}

impl State {
    /// Notes that a piece is used now; gives its place.
    fn touch(&mut self, key: Key) -> Option<u64> {
        let (place, used) = self.places.get_mut(&key)?;
        self.clock += 1;
        self.used.remove(used);
        self.used.insert(self.clock, key);
        *used = self.clock;
        Some(*place)
    }

    fn file(&mut self) -> io::Result<&File> {
        if self.file.is_none() {
            self.file = Some(scratch_file(&std::env::temp_dir()).map_err(told)?);
        }
        self.file.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn put(&mut self, key: Key, bytes: &[u8], limit: u64) -> io::Result<()> {
        if self.places.contains_key(&key) {
            // Two wanted it at the same time.
            return Ok(());
        }
        if self.free.is_empty() && self.made >= limit {
            let oldest = self.used.pop_first().and_then(|(_, oldest)| self.places.remove(&oldest));
            self.free.extend(oldest.map(|(place, _)| place));
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.made += 1;
            self.made - 1
        });
        if let Err(e) = self.file()?.write_all_at(bytes, place * PIECE) {
            self.free.push(place);
            return Err(told(e));
        }
        self.places.insert(key, (place, 0));
        self.touch(key);
        Ok(())
    }
}

fn told(e: io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("temporary file in {}: {e}", std::env::temp_dir().display()))
}

impl Kept {
    /// Keeps `bytes` at most, but a piece at least.
    pub(super) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { limit: (bytes / PIECE).max(1), state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in there can be half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches `len` bytes, all of them, and checks that they are `expected`, where that is known.
    pub(super) fn fetch(
        self: &Arc<Self>,
        len: u64,
        expected: Option<Digest>,
        fetch: Box<Fetch>,
    ) -> io::Result<Arc<dyn Source>> {
        let id = {
            let mut state = self.state();
            state.files += 1;
            state.files
        };
        let mut whole = Hasher::new(io::sink());
        let mut content = fetch(0, len)?;
        let (mut pieces, mut buffer) = (Vec::new(), vec![0; PIECE.min(len) as usize]);
        for number in 0..len.div_ceil(PIECE) {
            let piece = &mut buffer[..PIECE.min(len - number * PIECE) as usize];
            content.read_exact(piece)?;
            whole.write_all(piece)?;
            pieces.push(Digest::of(piece));
            self.state().put((id, number), piece, self.limit)?;
        }
        let (found, _) = whole.finish();
        matches(found, expected)?;
        Ok(Arc::new(Fetched { id, len, pieces, fetch, kept: self.clone() }))
    }
}

pub(super) fn matches(found: Digest, expected: Option<Digest>) -> io::Result<()> {
    Ok(expected.map_or(Ok(()), |expected| found.must_be(expected))?)
}

/// A file that was fetched, of which pieces may have to be fetched again.
struct Fetched {
    id: u64,
    len: u64,
    /// The digest of each piece.
    pieces: Vec<Digest>,
    fetch: Box<Fetch>,
    kept: Arc<Kept>,
}

impl Fetched {
    /// Fills `buf` from `offset` in a piece.
    fn read(&self, number: u64, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let key = (self.id, number);
        {
            let mut state = self.kept.state();
            if let Some(place) = state.touch(key) {
                return state.file()?.read_exact_at(buf, place * PIECE + offset);
            }
        }
        let start = number * PIECE;
        let mut piece = vec![0; PIECE.min(self.len - start) as usize];
        (self.fetch)(start, piece.len() as u64)?.read_exact(&mut piece)?;
        matches(Digest::of(&piece), self.pieces.get(number as usize).copied())
            .map_err(|e| io::Error::new(e.kind(), format!("changed since it was checked: {e}")))?;
        self.kept.state().put(key, &piece, self.kept.limit)?;
        buf.copy_from_slice(&piece[offset as usize..][..buf.len()]);
        Ok(())
    }
}

impl Source for Fetched {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len, offset, buf.len())?;
        while !buf.is_empty() {
            let (number, inside) = (offset / PIECE, offset % PIECE);
            let (now, rest) = buf.split_at_mut((PIECE - inside).min(buf.len() as u64) as usize);
            self.read(number, inside, now)?;
            (offset, buf) = (offset + now.len() as u64, rest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn no_more_than_the_bound_and_never_other_bytes() {
        let bytes: Arc<Vec<u8>> =
            Arc::new((0..5 * PIECE as u32 / 4 + 7).flat_map(u32::to_le_bytes).collect());
        let (asked, lie) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(u64::MAX)));
        let fetch = |bytes: &Arc<Vec<u8>>| -> Box<Fetch> {
            let (bytes, asked, lie) = (bytes.clone(), asked.clone(), lie.clone());
            Box::new(move |offset, len| {
                asked.fetch_add(len, Ordering::Relaxed);
                let mut part = bytes[offset as usize..][..len as usize].to_vec();
                if offset == lie.load(Ordering::Relaxed) {
                    part[3] ^= 1;
                }
                Ok(Box::new(io::Cursor::new(part)))
            })
        };
        let kept = Kept::new(2 * PIECE);
        let expected = Digest::of(&bytes);
        let file = kept.fetch(bytes.len() as u64, Some(expected), fetch(&bytes)).unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), bytes.len() as u64);
        for (offset, len) in [(0, 10), (PIECE - 3, 6), (5 * PIECE + 28, 0), (4 * PIECE, 20), (17, 4 * PIECE)]
        {
            let mut found = vec![0; len as usize];
            file.read_at(offset, &mut found).unwrap();
            assert!(found == bytes[offset as usize..][..len as usize], "{offset}+{len}");
        }
        assert!(file.read_at(5 * PIECE, &mut [0; 29]).is_err());
        let size = kept.state().file.as_ref().unwrap().metadata().unwrap().len();
        assert!(size <= 2 * PIECE, "{size}");
        // What is kept is not asked for again.
        let before = asked.load(Ordering::Relaxed);
        file.read_at(4 * PIECE + 5, &mut [0; 100]).unwrap();
        file.read_at(4 * PIECE + 500, &mut [0; 100]).unwrap();
        assert!(asked.load(Ordering::Relaxed) - before <= PIECE);
        // Other bytes the second time.
        lie.store(PIECE, Ordering::Relaxed);
        file.read_at(3 * PIECE, &mut [0; 100]).unwrap();
        file.read_at(2 * PIECE, &mut [0; 100]).unwrap();
        let e = file.read_at(PIECE, &mut [0; 100]).unwrap_err().to_string();
        assert!(e.starts_with("changed since it was checked: sha256 mismatch: expected "), "{e}");
        // And the first time.
        lie.store(0, Ordering::Relaxed);
        let e = kept.fetch(bytes.len() as u64, Some(expected), fetch(&bytes)).err().unwrap().to_string();
        assert!(e.starts_with(&format!("sha256 mismatch: expected {expected}, got ")), "{e}");
    }
}
