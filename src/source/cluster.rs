//! Clusters: what must be decoded as a whole to read any byte of it.
//!
//! A frame of a zstd blob, a physical cluster of an EROFS image, a data block or a fragment block of a squashfs image
//! are all the same thing to a reader: an expensive unit that many small ranges come from. A format describes itself
//! as a [`ClusterMap`]; [`Clustered`] makes a source of it whose clusters live in a shared, bounded [`Cache`].

use std::io;

/// One use of a cluster by a sequential reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The reader's position, in bytes of the outermost source, when it needs the cluster.
    pub at: u64,
    /// Which cluster.
    pub key: Key,
}

/// Names a cluster among all the open sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The number under which the source is registered in its [`Cache`].
    pub source: u32,
    /// The number of the cluster in that source.
    pub cluster: u32,
}

/// The longest cluster that is decoded, in bytes; anything that claims more is refused as hostile. `mkfs.erofs` makes
/// clusters of up to 4000 KiB, squashfs of up to 1 MiB, our own blobs of up to 4 MiB.
pub const MAX_CLUSTER: u32 = 64 << 20;

/// Decodes the clusters of one image.
pub trait ClusterCodec: Send + Sync {
    /// How many clusters there are.
    fn count(&self) -> u32;

    /// The decoded length of cluster `id < count()`, in bytes, at most [`MAX_CLUSTER`]; known without decoding.
    fn decoded_len(&self, id: u32) -> u32;

    /// Decodes cluster `id < count()` into exactly `decoded_len(id)` bytes. Pure but for reading the image; called
    /// from several threads at once.
    fn decode(&self, id: u32) -> io::Result<Vec<u8>>;
}

/// Where the bytes of an [`Extent`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From `offset` on in the decoded bytes of cluster `id`.
    Cluster {
        /// The cluster.
        id: u32,
        /// Offset in its decoded bytes.
        offset: u32,
    },
    /// From `offset` on in the image itself: stored uncompressed.
    Image {
        /// Offset in the image, in bytes.
        offset: u64,
    },
    /// Zero bytes: holes and padding.
    Zeros,
}

/// A run of bytes with one origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts in the source that the map describes. Extents are sorted and leave no gap.
    pub start: u64,
    /// How long it is, in bytes; never 0.
    pub len: u64,
    /// Where its bytes come from.
    pub origin: Origin,
}

/// A source described as runs of bytes out of clusters.
pub struct ClusterMap {
    /// The length of the source, in bytes.
    pub len: u64,
    /// What each byte of it is, in order.
    pub extents: Vec<Extent>,
    /// Decodes the clusters.
    pub codec: Box<dyn ClusterCodec>,
}
