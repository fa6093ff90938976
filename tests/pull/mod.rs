//! Pulling images: the trees that come out are those of the tools that people trust with it, hostile layers do no harm,
//! and a cache serves many at once.

mod cached;
mod costs;
mod hostile;
pub(crate) mod layers;
mod mirrored;
mod trees;
