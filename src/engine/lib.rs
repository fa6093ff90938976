//! What every byte of a disk image goes through: plain bytes with positioned reads ([`source`]), and compressed forms
//! opened up and made again ([`fold`]).
//!
//! A crate of its own, because these loops are compiled with optimization even where the rest of the program is not, and
//! because nothing in them knows of releases, images or networks.

pub mod bytes;
pub mod decompress;
pub mod fold;
pub mod io;
pub mod source;
