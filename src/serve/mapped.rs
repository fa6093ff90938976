//! Files of the cache that the kernel sends by itself.
//!
//! A file that is whole is mapped, and bodies are slices of the mapping, which nobody ever looks at: a socket without TLS
//! recognizes them by their addresses and has the kernel send these bytes of the file (`sendfile`), as web servers do.
//!
//! A page of a mapping that cannot be read ends the process (SIGBUS). So only bodies of HTTP/1.1 without TLS are such slices:
//! hyper passes their addresses on, where HTTP/2 and TLS copy. The kernel reports what cannot be read as an error, and the
//! request fails.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use axum::body::Bytes;
use memmap2::Mmap;
use rustix::fs::{Advice, fadvise};

/// By the address of its first byte.
static MAPPED: RwLock<BTreeMap<usize, Weak<Mapped>>> = RwLock::new(BTreeMap::new());

/// A file and the memory that it is mapped to.
pub struct Mapped {
    /// The file.
    pub file: File,
    map: Mmap,
}

/// Bytes of it.
struct Slice(Arc<Mapped>, Range<usize>);

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        &self.0.map[self.1.clone()]
    }
}

impl Mapped {
    /// Maps a file that is not empty, and that nobody changes any more.
    pub fn new(file: File) -> io::Result<Arc<Self>> {
        // SAFETY: the file has no name and is written no more, so that it does not change. Should somebody shorten it all the
        // same, nobody looks at the bytes (see above).
        #[allow(unsafe_code, reason = "memory that is a file can be had in no other way")]
        let map = unsafe { Mmap::map(&file)? };
        let mapped = Arc::new(Self { file, map });
        let mut all = MAPPED.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(mapped.map.as_ptr().addr(), Arc::downgrade(&mapped));
        drop(all);
        Ok(mapped)
    }

    /// The bytes `range`; those that follow are read ahead, so that sending them will not wait for a disk.
    pub fn slice(self: &Arc<Self>, range: Range<usize>) -> Bytes {
        let len = std::num::NonZeroU64::new((range.end - range.start) as u64);
        // What it does not do, sending does.
        let _ = fadvise(&self.file, range.end as u64, len, Advice::WillNeed);
        Bytes::from_owner(Slice(self.clone(), range))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Before the memory is given back, and others may have its addresses.
        MAPPED.write().unwrap_or_else(PoisonError::into_inner).remove(&self.map.as_ptr().addr());
    }
}

/// The file that these bytes are mapped from, and where they are in it.
pub fn find(bytes: &[u8]) -> Option<(Arc<Mapped>, u64)> {
    find_at(bytes.as_ptr().addr(), bytes.len())
}

fn find_at(at: usize, len: usize) -> Option<(Arc<Mapped>, u64)> {
    let (start, mapped) = {
        let all = MAPPED.read().unwrap_or_else(PoisonError::into_inner);
        let (start, mapped) = all.range(..=at).next_back()?;
        // A live slice keeps its mapping alive: where there is none, the bytes are of no mapping.
        (*start, mapped.upgrade()?)
    };
    // From here on this may be the last owner, whose drop takes the lock: it must not be held any more.
    let offset = at - start;
    (offset + len <= mapped.map.len()).then_some((mapped, offset as u64))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn bytes_are_found_in_their_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mapped = Mapped::new(file).unwrap();
        let bytes = mapped.slice(3..7);
        assert_eq!(&bytes[..], b"3456");
        assert_eq!(find(&bytes[1..]).map(|(_, offset)| offset), Some(4));
        assert!(find(b"3456").is_none());
        drop(mapped);
        assert!(find(&bytes).is_some());
        let start = bytes.as_ptr().addr() - 3;
        drop(bytes);
        assert!(!MAPPED.read().unwrap().contains_key(&start));
    }

    /// Whoever looks for other bytes may become the last owner of a mapping that its cache evicts meanwhile.
    #[test]
    fn finding_while_evicting() {
        const EVICTIONS: usize = 20_000;
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let evicted = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut file = tempfile::tempfile().unwrap();
                    file.write_all(b"0123456789").unwrap();
                    for i in 0..EVICTIONS {
                        let mapped = Mapped::new(file.try_clone().unwrap()).unwrap();
                        // For as long as it takes to be found, now more and now less.
                        (0..i % 5000).for_each(|_| std::hint::spin_loop());
                        drop(mapped);
                    }
                    evicted.store(true, std::sync::atomic::Ordering::Relaxed);
                });
                while !evicted.load(std::sync::atomic::Ordering::Relaxed) {
                    // Behind all mappings, so that the last of them is looked at.
                    assert!(find_at(usize::MAX - 10, 4).is_none());
                }
            });
            done.send(()).unwrap();
        });
        is_done.recv_timeout(std::time::Duration::from_secs(60)).expect("a thread waits for itself");
    }
}
