//! What a format parser finds.

use super::zlib::Wrap;

/// Something compressed. Where it really ends is found out by decoding it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Region {
    /// A deflate stream that is decoded and encoded in memory.
    Small {
        /// Where it starts.
        offset: u64,
        /// It is at most this long,
        max_len: u32,
        /// and its plain bytes at most this.
        max_plain: u32,
        /// Raw or with the zlib header.
        wrap: Wrap,
    },
    /// A run of gzip members.
    Gzip {
        /// Where the first starts.
        offset: u64,
        /// The last ends here at the latest.
        end: u64,
    },
}
