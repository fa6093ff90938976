//! `mirror`: run as users run it, against nginx over trees like those of the release servers, signed by the real gpg.

mod config;
mod contrib;
mod crash;
mod hostile;
mod images;
mod installers;
pub(crate) mod site;
mod streams;
mod trees;
