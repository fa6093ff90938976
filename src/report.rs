//! Tables for people and JSON for programs about what is in a dehydrated directory.

use std::io::{self, Write};

use anyhow::Result;

use crate::recipe::{Artifact, Index};
use crate::terminal::plain;

/// Prints what dehydrating made of each artifact, and the totals.
pub fn dehydrated(index: &Index, out: &mut dyn Write) -> Result<()> {
    let width = name_width(index);
    let line = |out: &mut dyn Write, name: &str, published: &str, stored: &str, ratio: &str, tier: &str| {
        writeln!(out, "{name:width$}  {published:>10}  {stored:>10}  {ratio:>8}  {tier}")
    };
    line(out, "artifact", "published", "stored", "ratio", "tier")?;
    for a in &index.artifacts {
        let size = a.published.blob.size;
        line(out, &name(index, a), &bytes(size), &bytes(a.stored), &ratio(a.stored, size), &tier(a))?;
    }
    for u in &index.unhandled {
        line(out, &plain(&u.name), "", "", "", &format!("unhandled: {}", plain(&u.reason)))?;
    }
    let published = index.artifacts.iter().map(|a| a.published.blob.size).sum();
    let stored = index.blobs().iter().map(|b| b.size).sum();
    line(out, "total", &bytes(published), &bytes(stored), &ratio(stored, published), "")?;
    for previous in &index.previous {
        let size = bytes(previous.file.blob.size);
        writeln!(out, "built on {} of an earlier release, {size} of the total", plain(&previous.file.name))?;
    }
    Ok(())
}

/// Prints every artifact.
pub fn list(index: &Index, json: bool, out: &mut dyn Write) -> Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, &index.artifacts)?;
        return Ok(writeln!(out)?);
    }
    let rows: Vec<_> = index
        .artifacts
        .iter()
        .map(|a| ([&a.arch, &a.platform, &a.format, &a.output.name].map(plain), a))
        .collect();
    let longest = |n: usize, least| rows.iter().map(|(row, _)| row[n].len()).max().unwrap_or(0).max(least);
    let [arch, platform, format, name] = [longest(0, 4), longest(1, 8), longest(2, 6), longest(3, 4)];
    let line =
        |out: &mut dyn Write, a: &str, p: &str, f: &str, n: &str, size: &str, tier: &str| -> io::Result<()> {
            writeln!(out, "{a:arch$}  {p:platform$}  {f:format$}  {n:name$}  {size:>11}  {tier}")
        };
    line(out, "arch", "platform", "format", "name", "size", "tier")?;
    for ([arch, platform, format, name], a) in &rows {
        let size = bytes(a.output.blob.size);
        line(out, arch, platform, format, name, &size, &a.tier.to_string())?;
    }
    Ok(())
}

/// The tier, and why it is not the better one.
fn tier(artifact: &Artifact) -> String {
    match &artifact.not_published {
        Some(reason) => format!("{}: {}", artifact.tier, plain(reason)),
        None => artifact.tier.to_string(),
    }
}

/// How an artifact is called in a table: with its architecture where there are several.
fn name(index: &Index, artifact: &Artifact) -> String {
    match index.architectures().len() {
        1 => plain(artifact.label()),
        _ => plain(format_args!("{} {}", artifact.arch, artifact.label())),
    }
}

fn name_width(index: &Index) -> usize {
    let names = index.artifacts.iter().map(|a| name(index, a).len());
    names.chain(index.unhandled.iter().map(|u| plain(&u.name).len())).max().unwrap_or(0).max(8)
}

/// A number of bytes for people: `1.5 MB`; powers of ten, as disks and downloads are counted.
pub fn bytes(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

fn ratio(part: u64, whole: u64) -> String {
    if whole == 0 { String::new() } else { format!("{:.2} %", part as f64 * 100.0 / whole as f64) }
}
