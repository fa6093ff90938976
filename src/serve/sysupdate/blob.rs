//! Answers with a blob of a registry, or a part of it, as it comes.
//!
//! What is sent whole is checked on the way: the last piece is kept back until the digest is known to be right. If it is
//! not, the answer breaks off short of its length, and no client takes it for the file.
//!
//! Of each download at most three pieces are in memory: one that is being sent, one that waits, and the last one read.

use std::io::{self, Read};
use std::ops::Range;

use anyhow::Result;
use axum::body::Body;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::mpsc;

use crate::digest::Digest;
use crate::registry::{Client, Reference};

use super::super::clients::Place;
use super::super::http::{File, say};

/// Bytes of a piece.
const PIECE: usize = 32 << 10;

/// Pieces that wait for a client.
const AHEAD: usize = 1;

/// Answers with the blob `digest`, which has `size` bytes. `place` is kept until all is sent.
pub(super) async fn answer(
    client: &Client,
    repository: &Reference,
    (digest, size): (Digest, u64),
    (method, headers): (&Method, &HeaderMap),
    place: Place,
) -> Response {
    let file = File { name: None, media_type: "application/octet-stream", size, digest };
    let wanted = file.wanted(method, headers);
    let Some(Range { start, end }) = file.body(method, &wanted) else {
        return file.respond(method, &wanted, |_| Body::empty());
    };
    let (to, mut pieces) = mpsc::channel(AHEAD);
    let (client, repository) = (client.clone(), repository.clone());
    tokio::task::spawn_blocking(move || {
        let _place = place;
        let open = || match (start, end) {
            (0, end) if end == size => client.blob(&repository, digest, size),
            _ => client.blob_range(&repository, digest, start..end, size),
        };
        if let Err(e) = open().and_then(|mut reader| feed(&mut reader, &to)) {
            tracing::error!("{}@{}: {e:#}", repository.name(), digest.oci());
            let _ = to.blocking_send(Err(io::ErrorKind::BrokenPipe.into()));
        }
    });
    // A registry that does not have it, or something else, is found out before anything is promised.
    let first = match pieces.recv().await {
        Some(Err(_)) => {
            return say(StatusCode::BAD_GATEWAY, "the registry does not give the file");
        }
        first => first,
    };
    let rest = stream::unfold((first, pieces), |(first, mut pieces)| async {
        let piece = match first {
            Some(piece) => Some(piece),
            None => pieces.recv().await,
        };
        piece.map(|piece| (piece, (None, pieces)))
    });
    file.respond(method, &wanted, |_| Body::from_stream(rest))
}

/// Sends all that `reader` gives, the last piece only when it has ended well.
fn feed(reader: &mut dyn Read, to: &mpsc::Sender<io::Result<Bytes>>) -> Result<()> {
    let mut held = None;
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        let read = reader.take(PIECE as u64).read_to_end(&mut piece)?;
        if let Some(held) = held.take()
            && to.blocking_send(Ok(held)).is_err()
        {
            // The client is gone, or was cut off because it takes nothing.
            return Ok(());
        }
        if read == 0 {
            return Ok(());
        }
        held = Some(Bytes::from(piece));
    }
}
