//! Unfold and fold: what is compressed inside an artifact, and the way back.
//!
//! [`unfold()`] replaces every deflate stream it finds in a form (a grain of a VMDK, a cluster of a qcow2, a gzip member) by its plain
//! bytes. That gives a *plain stream*, in which the content of the disk lies open for a delta, and a [`Map`], with
//! which [`fold`] makes the very bytes of the form again.
//!
//! ```text
//! form ─► scan ─► regions ─► decode, find the encoder ─► plain stream + map       unfold.rs
//!                 vmdk qcow2 tar gzip      deflate preflate stream
//! form ◄───────────────────────── encode ◄── plain stream + map                   encode.rs
//! ```
//!
//! A format module is only a parser that says where regions lie. A region that does not come back exactly is left as
//! it is. Outer compression is peeled off by [`peel()`]; [`wrap()`] finds the map that puts it on again.

mod deflate;
mod encode;
mod gnu_gzip;
mod gzip;
mod huffman;
mod map;
mod peel;
mod preflate;
mod qcow2;
mod region;
mod scan;
mod stream;
mod tar;
mod unfold;
mod view;
mod vmdk;
mod wrap;
mod xz;
pub mod zip;
mod zlib;
mod zst;

pub use encode::fold;
pub use map::{MAX_MAP, Map};
pub use peel::{Compression, Peeled, peel};
pub use unfold::{Unfolded, unfold};
pub use view::Folded;
pub use wrap::{Effort, wrap};
