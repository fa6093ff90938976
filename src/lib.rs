//! Rehydrator: a whole CoreOS release as one container image that gives back every disk image bit for bit.
//!
//! ```text
//! stream.json ─► catalog ─► unfold ─► delta ─► store            (build: dehydrate)
//!                                                │
//! sink ◄──── fold ◄──────── source ◄─────────────┘               (run: rehydrate)
//! ```
//!
//! Modules follow that flow and import only from those before them; `tests/imports.rs` holds them to it.

pub mod cli;
pub mod digest;
pub mod inspect;
pub mod io;
pub mod recipe;
pub mod source;
