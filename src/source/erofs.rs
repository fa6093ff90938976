//! The files of an EROFS image.
