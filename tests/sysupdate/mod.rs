//! `serve --registry`: what is in a registry, for systemd-sysupdate. Judged by the systemd-sysupdate of Debian 13 over
//! docker-registry, by gpg and curl, and against registries that lie.

mod common;
mod http;
mod lies;
mod scope;
mod updates;
