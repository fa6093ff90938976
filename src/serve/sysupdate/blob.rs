//! Answers with a blob of a registry, or a part of it, as it comes.
//!
//! What is sent whole is checked on the way: the last piece is kept back until the digest is known to be right. If it is
//! not, the answer breaks off short of its length, and no client takes it for the file.

use std::io::{self, Read};
use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::digest::Digest;
use crate::registry::{Client, Reference};

/// Bytes of a piece.
const PIECE: usize = 128 << 10;

/// Pieces that wait for a client.
const AHEAD: usize = 2;

/// Time after which a client that takes nothing is given up.
const STALL: Duration = Duration::from_secs(60);

/// What a request wants of a file.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Unchanged,
    Whole,
    Part(Range<u64>),
    Nothing,
}

fn wanted(headers: &HeaderMap, etag: &str, size: u64) -> Wanted {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(tags) = text(IF_NONE_MATCH)
        && tags.split(',').map(str::trim).any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
    {
        return Wanted::Unchanged;
    }
    match text(RANGE) {
        Some(range) if text(IF_RANGE).is_none_or(|tag| tag == etag) => part(range, size),
        _ => Wanted::Whole,
    }
}

/// What `Range` wants. One that cannot be understood, and several parts, are as if there were none.
fn part(range: &str, size: u64) -> Wanted {
    let number = |text: &str| -> Option<Option<u64>> {
        let digits = text.chars().all(|c| c.is_ascii_digit());
        // A number that is too large is one all the same.
        digits.then(|| (!text.is_empty()).then(|| text.parse().unwrap_or(u64::MAX)))
    };
    let ends = || {
        let (start, end) = range.strip_prefix("bytes=")?.trim().split_once('-')?;
        Some((number(start)?, number(end)?))
    };
    let (start, end) = match ends() {
        Some((Some(start), Some(end))) if start <= end => (start, end.saturating_add(1).min(size)),
        Some((Some(start), None)) => (start, size),
        Some((None, Some(last))) => (size - last.min(size), size),
        _ => return Wanted::Whole,
    };
    if start < end { Wanted::Part(start..end) } else { Wanted::Nothing }
}

/// Answers with the blob `digest`, which has `size` bytes. `permit` is kept until all is sent.
pub(super) async fn answer(
    client: &Client,
    repository: &Reference,
    (digest, size): (Digest, u64),
    (method, headers): (&Method, &HeaderMap),
    permit: OwnedSemaphorePermit,
) -> Response {
    let etag = format!("\"{}\"", digest.oci());
    let common = [
        (ETAG, etag.clone()),
        (ACCEPT_RANGES, "bytes".into()),
        (CONTENT_TYPE, "application/octet-stream".into()),
    ];
    let range = match wanted(headers, &etag, size) {
        Wanted::Unchanged => return (StatusCode::NOT_MODIFIED, [(ETAG, etag)]).into_response(),
        Wanted::Nothing => {
            let all = [(CONTENT_RANGE, format!("bytes */{size}"))];
            return (StatusCode::RANGE_NOT_SATISFIABLE, all).into_response();
        }
        Wanted::Whole => None,
        Wanted::Part(range) => Some(range),
    };
    let Range { start, end } = range.clone().unwrap_or(0..size);
    let length = [(CONTENT_LENGTH, (end - start).to_string())];
    let head = match range {
        None => (StatusCode::OK, common, length).into_response(),
        Some(_) => {
            let part = [(CONTENT_RANGE, format!("bytes {start}-{}/{size}", end - 1))];
            (StatusCode::PARTIAL_CONTENT, common, length, part).into_response()
        }
    };
    if method == Method::HEAD {
        return head;
    }
    let (to, mut pieces) = mpsc::channel(AHEAD);
    let (client, repository) = (client.clone(), repository.clone());
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let open = || match (start, end) {
            (0, end) if end == size => client.blob(&repository, digest, size),
            _ => client.blob_range(&repository, digest, start, end - start),
        };
        if let Err(e) = open().and_then(|mut reader| feed(&mut reader, &to)) {
            tracing::error!("{}@{}: {e:#}", repository.name(), digest.oci());
            let _ = send(&to, Err(io::ErrorKind::BrokenPipe.into()));
        }
    });
    // A registry that does not have it, or something else, is found out before anything is promised.
    let first = match pieces.recv().await {
        Some(Err(_)) => {
            return (StatusCode::BAD_GATEWAY, "the registry does not give the file\n").into_response();
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
    let (parts, _) = head.into_parts();
    Response::from_parts(parts, Body::from_stream(rest))
}

/// Sends all that `reader` gives, the last piece only when it has ended well.
fn feed(reader: &mut dyn Read, to: &mpsc::Sender<io::Result<Bytes>>) -> Result<()> {
    let mut held = None;
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        let read = reader.take(PIECE as u64).read_to_end(&mut piece)?;
        if let Some(held) = held.take()
            && !send(to, Ok(held))
        {
            return Ok(());
        }
        if read == 0 {
            return Ok(());
        }
        held = Some(Bytes::from(piece));
    }
}

/// False when nobody takes it.
fn send(to: &mpsc::Sender<io::Result<Bytes>>, piece: io::Result<Bytes>) -> bool {
    let sent = Handle::current().block_on(tokio::time::timeout(STALL, to.send(piece)));
    matches!(sent, Ok(Ok(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (range, expected) in [
            ("bytes=0-0", Wanted::Part(0..1)),
            ("bytes=0-", Wanted::Part(0..10)),
            ("bytes=3-99999999999999999999999", Wanted::Part(3..10)),
            ("bytes=-3", Wanted::Part(7..10)),
            ("bytes=-30", Wanted::Part(0..10)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=99999999999999999999999-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=5-4", Wanted::Whole),
            ("bytes=0-1,3-4", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes", Wanted::Whole),
            ("lines=1-2", Wanted::Whole),
        ] {
            assert_eq!(part(range, 10), expected, "{range}");
        }
        assert_eq!(part("bytes=0-", 0), Wanted::Nothing);
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, "bytes=1-".parse().unwrap());
        headers.insert(IF_RANGE, "\"x\"".parse().unwrap());
        assert_eq!(wanted(&headers, "\"x\"", 2), Wanted::Part(1..2));
        assert_eq!(wanted(&headers, "\"y\"", 2), Wanted::Whole);
        headers.insert(IF_NONE_MATCH, "\"z\", W/\"y\"".parse().unwrap());
        assert_eq!(wanted(&headers, "\"y\"", 2), Wanted::Unchanged);
    }
}
