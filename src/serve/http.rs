//! What HTTP asks of every file: conditions, ranges, methods, names.

use std::ops::Range;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};

use crate::digest::Digest;

/// The longest header of conditions or ranges that is looked at, in bytes.
const MAX_HEADER: usize = 8 << 10;

/// A file to be sent.
pub struct File<'a> {
    /// Its name where it is to be saved; none for what is to be shown.
    pub name: Option<&'a str>,
    /// Its media type.
    pub media_type: &'static str,
    /// Its length in bytes.
    pub size: u64,
    /// Its digest.
    pub digest: Digest,
}

/// A plain answer in words.
pub fn say(status: StatusCode, text: impl Into<String>) -> Response<Body> {
    let mut text = text.into();
    text.push('\n');
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// How long a client is to wait before it asks again when there is too much to do, in seconds.
pub const RETRY: &str = "5";

/// 503: too much is being done at the moment.
pub fn busy(text: impl Into<String>) -> Response<Body> {
    let mut response = say(StatusCode::SERVICE_UNAVAILABLE, text);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY));
    response
}

/// What a request wants of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All of its bytes, or only its headers.
    All,
    /// These of its bytes, which may be all.
    Part(Range<u64>),
    /// Nothing: the client has it.
    NotModified,
    /// Bytes that it does not have.
    Unsatisfiable,
    /// Another file.
    Failed,
}

impl File<'_> {
    fn etag(&self) -> String {
        format!("\"{}\"", self.digest)
    }

    /// What `headers` want.
    pub fn wanted(&self, method: &Method, headers: &HeaderMap) -> Wanted {
        let etag = self.etag();
        let get = |name| {
            headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok()).filter(|v| v.len() <= MAX_HEADER)
        };
        let listed = |list: &str, weak: bool| {
            list.split(',').map(str::trim).any(|tag| {
                tag == "*" || tag == etag || weak && tag.strip_prefix("W/").is_some_and(|tag| tag == etag)
            })
        };
        if get(header::IF_MATCH).is_some_and(|list| !listed(list, false)) {
            return Wanted::Failed;
        }
        if get(header::IF_NONE_MATCH).is_some_and(|list| listed(list, true)) {
            return Wanted::NotModified;
        }
        // A date is none of ours.
        if method != Method::GET || get(header::IF_RANGE).is_some_and(|tag| tag.trim() != etag) {
            return Wanted::All;
        }
        match get(header::RANGE).and_then(|range| parse_range(range, self.size)) {
            None => Wanted::All,
            Some(None) => Wanted::Unsatisfiable,
            Some(Some(range)) => Wanted::Part(range),
        }
    }

    /// The bytes that an answer is to have in its body, if it has one.
    pub fn body(&self, method: &Method, wanted: &Wanted) -> Option<Range<u64>> {
        match wanted {
            _ if method != Method::GET => None,
            Wanted::All => Some(0..self.size),
            Wanted::Part(range) => Some(range.clone()),
            _ => None,
        }
    }

    /// The answer, whose body, if it has one, `body` makes.
    pub fn respond(
        &self,
        method: &Method,
        wanted: &Wanted,
        body: impl FnOnce(Range<u64>) -> Body,
    ) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        let mut set = |name, value: String| {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(name, value);
            }
        };
        set(header::ETAG, self.etag());
        set(header::ACCEPT_RANGES, "bytes".into());
        // The same path may have another release tomorrow; the ETag makes asking again cheap.
        set(header::CACHE_CONTROL, "no-cache".into());
        let status = match wanted {
            Wanted::NotModified => StatusCode::NOT_MODIFIED,
            Wanted::Failed => StatusCode::PRECONDITION_FAILED,
            Wanted::Unsatisfiable => {
                set(header::CONTENT_RANGE, format!("bytes */{}", self.size));
                StatusCode::RANGE_NOT_SATISFIABLE
            }
            Wanted::All => {
                set(header::CONTENT_LENGTH, self.size.to_string());
                StatusCode::OK
            }
            Wanted::Part(Range { start, end }) => {
                set(header::CONTENT_LENGTH, (end - start).to_string());
                set(header::CONTENT_RANGE, format!("bytes {start}-{}/{}", end - 1, self.size));
                StatusCode::PARTIAL_CONTENT
            }
        };
        if status.is_success() {
            set(header::CONTENT_TYPE, self.media_type.into());
            if let Some(name) = self.name {
                set(header::CONTENT_DISPOSITION, disposition(name));
            }
        }
        *response.status_mut() = status;
        if let Some(range) = self.body(method, wanted) {
            *response.body_mut() = body(range);
        }
        response
    }

    /// The answer for bytes in memory.
    pub fn bytes(&self, method: &Method, headers: &HeaderMap, bytes: &Bytes) -> Response<Body> {
        let wanted = self.wanted(method, headers);
        self.respond(method, &wanted, |range| {
            Body::from(bytes.slice(range.start as usize..range.end as usize))
        })
    }
}

/// Parses `bytes=A-B`, `bytes=A-` and `bytes=-N` of a file of `size` bytes. `None` where the header is to be ignored,
/// which it is with several ranges: all of the file is a right answer to that. `Some(None)` where there are no such bytes.
fn parse_range(text: &str, size: u64) -> Option<Option<Range<u64>>> {
    let (unit, range) = text.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number that no integer holds is larger than any file.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let (start, end) = match (first, last) {
        ("", n) => (size.saturating_sub(number(n)?), if number(n)? == 0 { 0 } else { size }),
        (a, "") => (number(a)?, size),
        (a, b) => {
            let (a, b) = (number(a)?, number(b)?);
            if b < a {
                return None;
            }
            (a, b.saturating_add(1).min(size))
        }
    };
    Some((start < end).then_some(start..end))
}

/// Names that are plain go as they are, others as RFC 8187 has it.
fn disposition(name: &str) -> String {
    if name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(&b)) {
        return format!("attachment; filename=\"{name}\"");
    }
    let encoded = percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC);
    format!("attachment; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (text, range) in [
            ("bytes=0-0", Some(Some(0..1))),
            ("bytes=5-", Some(Some(5..10))),
            ("bytes=-3", Some(Some(7..10))),
            ("bytes=-99", Some(Some(0..10))),
            ("bytes=0-99999999999999999999999", Some(Some(0..10))),
            ("Bytes = 2-3 ", Some(Some(2..4))),
            ("bytes=10-", Some(None)),
            ("bytes=99999999999999999999999-", Some(None)),
            ("bytes=-0", Some(None)),
            ("bytes=4-2", None),
            ("bytes=0-1,4-5", None),
            ("bytes=-", None),
            ("bytes=+1-2", None),
            ("bytes=1 - 2", None),
            ("lines=0-1", None),
            ("bytes", None),
        ] {
            assert_eq!(parse_range(text, 10), range, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Some(None));
    }

    #[test]
    fn conditions() {
        let digest = Digest::of(b"x");
        let file = File { name: None, media_type: "text/plain", size: 2, digest };
        let wanted = |lines: &[(header::HeaderName, String)]| {
            let headers = lines.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
            file.wanted(&Method::GET, &headers)
        };
        let (same, other) = (format!("\"{digest}\""), "\"y\"".to_owned());
        let range = || (header::RANGE, "bytes=1-".to_owned());
        assert_eq!(wanted(&[range(), (header::IF_RANGE, same.clone())]), Wanted::Part(1..2));
        assert_eq!(wanted(&[range(), (header::IF_RANGE, other.clone())]), Wanted::All);
        let list = format!("{other}, W/{same}");
        assert_eq!(wanted(&[range(), (header::IF_NONE_MATCH, list.clone())]), Wanted::NotModified);
        assert_eq!(wanted(&[(header::IF_MATCH, list)]), Wanted::Failed);
        assert_eq!(wanted(&[(header::IF_MATCH, same)]), Wanted::All);
    }
}
