//! What a run of the mirror did: for people, for programs, and for Prometheus.

use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use indicatif::HumanBytes;
use serde::Serialize;

use crate::staging::write_file;
use crate::terminal::plain;

use super::plan::{Problem, Skipped};

/// What a run did.
#[derive(Debug, Default, Serialize)]
pub struct Summary {
    /// Files that were got.
    pub new: usize,
    /// Files that were there already.
    pub kept: usize,
    /// Their lengths, of those that were got.
    pub bytes: u64,
    /// Each channel that could be looked at.
    pub channels: Vec<ChannelSummary>,
    /// What failed.
    pub failed: Vec<Problem>,
    /// What the servers have, and the mirror does not take.
    pub skipped: Vec<Skipped>,
    /// Versions that were removed.
    pub removed: Vec<String>,
    /// Images of streams, with `--dehydrate`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<ImageSummary>,
    /// When a run ended without a failure, in seconds since 1970.
    pub last_success: Option<u64>,
}

/// How a channel is now.
#[derive(Debug, Serialize)]
pub struct ChannelSummary {
    /// Its directory.
    pub channel: String,
    /// What `current` names.
    pub current: Option<String>,
    /// Whether everything of it that is wanted is there.
    pub complete: bool,
}

/// The image of a stream.
#[derive(Debug, Serialize)]
pub struct ImageSummary {
    /// Its name, with the version as its tag.
    pub image: String,
    /// The tag that moves: the name of the stream.
    pub stream: String,
    /// Its digest.
    pub digest: String,
    /// Whether it was built; if not, it was there.
    pub new: bool,
}

impl Summary {
    /// Prints it for people.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        for channel in &self.channels {
            let current = channel.current.as_deref().unwrap_or("-");
            let state = if channel.complete { "complete" } else { "incomplete" };
            writeln!(out, "{}: current {current}, {state}", channel.channel)?;
        }
        for removed in &self.removed {
            writeln!(out, "removed {removed}")?;
        }
        for ImageSummary { image, digest, new, .. } in &self.images {
            writeln!(out, "image {image} {digest}, {}", if *new { "new" } else { "kept" })?;
        }
        for skipped in &self.skipped {
            writeln!(out, "skipped {}: {}", plain(&skipped.what), plain(&skipped.why))?;
        }
        for failure in &self.failed {
            writeln!(out, "failed {}: {}", plain(&failure.what), plain(&failure.error))?;
        }
        writeln!(
            out,
            "{} new ({}), {} kept, {} skipped, {} failed",
            self.new,
            HumanBytes(self.bytes),
            self.kept,
            self.skipped.len(),
            self.failed.len()
        )
    }

    /// Writes it for the textfile collector of Prometheus' node exporter.
    pub fn write_prometheus(&self, path: &Path) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut text = String::new();
        let mut metric = |name: &str, help: &str, values: &[(&str, u64)]| {
            text +=
                &format!("# HELP rehydrator_mirror_{name} {help}\n# TYPE rehydrator_mirror_{name} gauge\n");
            for (labels, value) in values {
                text += &format!("rehydrator_mirror_{name}{labels} {value}\n");
            }
        };
        metric("last_run_timestamp_seconds", "When the last run ended.", &[("", now)]);
        metric(
            "last_success_timestamp_seconds",
            "When a run last ended without a failure; 0 if none has.",
            &[("", self.last_success.unwrap_or(0))],
        );
        metric(
            "files",
            "Files of the last run.",
            &[
                ("{state=\"new\"}", self.new as u64),
                ("{state=\"kept\"}", self.kept as u64),
                ("{state=\"skipped\"}", self.skipped.len() as u64),
            ],
        );
        metric("new_bytes", "Length of all files that the last run got.", &[("", self.bytes)]);
        metric("failures", "What failed in the last run.", &[("", self.failed.len() as u64)]);
        write_file(path, text.as_bytes())
    }
}
