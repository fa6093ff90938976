//! What is counted, in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// A number.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Takes 1 away.
    pub fn less(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What happened since the start, and what is going on.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "`print` says what each is")]
pub struct Metrics {
    /// By method and status.
    pub requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    pub bytes: Number,
    pub aborted: Number,
    pub connections: Number,
    pub refused: Number,
    pub closed: Number,
    pub streams: Number,
    pub hits: Number,
    pub misses: Number,
    pub evictions: Number,
    pub rehydrations: Number,
    pub failed_rehydrations: Number,
    pub cancelled_rehydrations: Number,
    pub rehydration_millis: Number,
    pub mismatches: Number,
    pub upstream_errors: Number,
}

impl Metrics {
    /// Counts a request.
    pub fn request(&self, method: &'static str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((method, status)).or_default() += 1;
    }

    /// As Prometheus reads it. `cache` is what it holds and may hold, `making` how many files are being made.
    pub fn print(&self, (held, limit): (u64, u64), making: usize) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, values: &[(String, String)]| {
            // Writing to a string cannot fail.
            let _ = write!(text, "# HELP rehydrator_{name} {help}\n# TYPE rehydrator_{name} {kind}\n");
            for (labels, value) in values {
                let _ = writeln!(text, "rehydrator_{name}{labels} {value}");
            }
        };
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let requests: Vec<_> = requests
            .iter()
            .map(|((method, code), n)| (format!("{{method=\"{method}\",code=\"{code}\"}}"), n.to_string()))
            .collect();
        metric("http_requests_total", "counter", "Requests answered.", &requests);
        let result = |result: &str, n: &Number| (format!("{{result=\"{result}\"}}"), n.get().to_string());
        metric(
            "rehydrations_total",
            "counter",
            "Files made for the cache.",
            &[
                result("good", &self.rehydrations),
                result("failed", &self.failed_rehydrations),
                result("cancelled", &self.cancelled_rehydrations),
            ],
        );
        let seconds = self.rehydration_millis.get() as f64 / 1e3;
        let one = |value: String| [(String::new(), value)];
        metric(
            "rehydration_seconds_total",
            "counter",
            "Time it took to make them.",
            &one(seconds.to_string()),
        );
        for (name, kind, help, value) in [
            ("http_response_bytes_total", "counter", "Bytes of bodies sent.", self.bytes.get()),
            (
                "http_aborted_total",
                "counter",
                "Responses that ended before their last byte.",
                self.aborted.get(),
            ),
            ("http_connections", "gauge", "Connections that are open.", self.connections.get()),
            (
                "http_connections_refused_total",
                "counter",
                "Connections refused because too many were open.",
                self.refused.get(),
            ),
            (
                "http_connections_closed_total",
                "counter",
                "Connections closed because they were idle or stalled, or to make room for other clients.",
                self.closed.get(),
            ),
            ("http_downloads", "gauge", "Files being sent.", self.streams.get()),
            ("cache_hits_total", "counter", "Files that were in the cache, or being made.", self.hits.get()),
            ("cache_misses_total", "counter", "Files that were not.", self.misses.get()),
            (
                "cache_evictions_total",
                "counter",
                "Files removed from the cache to make room.",
                self.evictions.get(),
            ),
            ("cache_bytes", "gauge", "Bytes that the cache holds.", held),
            ("cache_limit_bytes", "gauge", "Bytes that it may hold.", limit),
            ("rehydrations_running", "gauge", "Files being made, or waiting to be.", making as u64),
            (
                "digest_mismatches_total",
                "counter",
                "Downloads aborted because the bytes were not the right ones.",
                self.mismatches.get(),
            ),
            (
                "upstream_errors_total",
                "counter",
                "Failures to open or read a dehydrated directory or an image.",
                self.upstream_errors.get(),
            ),
        ] {
            metric(name, kind, help, &one(value.to_string()));
        }
        text
    }
}
