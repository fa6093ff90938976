//! Registries: reading from them, pushing to them, signatures; judged by docker-registry and skopeo, and against
//! servers that do what no real one does on demand.

mod client;
pub(crate) mod image;
mod many;
mod skopeo;
mod trust;
