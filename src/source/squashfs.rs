//! The files of a squashfs image.
