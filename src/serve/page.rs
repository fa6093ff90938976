//! The page for people: what there is, and how to get it. Made on the server; nothing in it comes from elsewhere.

use askama::Template;
use url::Url;

use super::releases::Release;
use crate::recipe::{Artifact, Tier};
use crate::report::bytes;

/// `templates/index.html`.
#[derive(Template)]
#[template(path = "index.html")]
pub struct Page {
    base: String,
    version: &'static str,
    releases: Vec<ReleaseView>,
    making: Vec<Making>,
    /// Whether disk images of a registry are offered too.
    sysupdate: bool,
}

struct ReleaseView {
    id: String,
    stream: String,
    version: String,
    newest: bool,
    signed: bool,
    architectures: Vec<ArchView>,
}

struct ArchView {
    name: String,
    rows: Vec<Row>,
    netboot: bool,
    /// The address of a disk, for examples.
    example: Option<String>,
    platform: Option<String>,
}

struct Row {
    id: String,
    platform: String,
    format: String,
    tier: Tier,
    reason: String,
    files: Vec<FileView>,
    signature: Option<String>,
}

struct FileView {
    label: &'static str,
    name: String,
    url: String,
    size: String,
    sha256: String,
}

struct Making {
    name: String,
    written: String,
    size: String,
    percent: u64,
}

impl Page {
    /// Of these releases, at `base`, while these files are being made, and a registry is offered or not.
    pub fn new(
        releases: &[std::sync::Arc<Release>],
        base: &Url,
        making: Vec<(String, u64, u64)>,
        sysupdate: bool,
    ) -> Self {
        let mut views: Vec<ReleaseView> = Vec::new();
        for release in releases {
            let newest = views.last().is_none_or(|last| last.stream != release.stream);
            views.push(view(release, newest));
        }
        let making = making.into_iter().map(|(name, written, size)| Making {
            name,
            percent: (written.saturating_mul(100)).checked_div(size).unwrap_or(100),
            written: bytes(written),
            size: bytes(size),
        });
        let base = base.as_str().trim_end_matches('/').to_owned();
        Self {
            base,
            version: env!("CARGO_PKG_VERSION"),
            releases: views,
            making: making.collect(),
            sysupdate,
        }
    }
}

fn view(release: &Release, newest: bool) -> ReleaseView {
    let id = format!("{}-{}", release.stream, release.version);
    let mut architectures: Vec<ArchView> = Vec::new();
    for (artifact, dir) in release.artifacts().iter().zip(&release.dirs) {
        let Some(dir) = dir else { continue };
        let at = match architectures.iter().position(|a| a.name == artifact.arch) {
            Some(at) => at,
            None => {
                let name = artifact.arch.clone();
                let netboot = release.live().contains_key(&*name);
                architectures.push(ArchView {
                    name,
                    rows: Vec::new(),
                    netboot,
                    example: None,
                    platform: None,
                });
                architectures.len() - 1
            }
        };
        let arch = &mut architectures[at];
        let row = row(artifact, dir, format!("{id}-{}-{}", artifact.arch, arch.rows.len()));
        if artifact.disk().is_some() && (arch.example.is_none() || artifact.platform == "qemu") {
            arch.example = row.files.last().map(|file| file.url.clone());
            arch.platform = artifact.disk();
        }
        arch.rows.push(row);
    }
    let (stream, version, signed) =
        (release.stream.clone(), release.version.clone(), release.signature().is_some());
    ReleaseView { id, stream, version, newest, signed, architectures }
}

fn row(artifact: &Artifact, dir: &str, id: String) -> Row {
    let file = |label, file: &crate::recipe::NamedFile| {
        let name = percent_encoding::utf8_percent_encode(&file.name, super::PATH_SET);
        FileView {
            label,
            name: file.name.clone(),
            url: format!("/{dir}/{name}"),
            size: bytes(file.blob.size),
            sha256: file.blob.sha256.to_string(),
        }
    };
    let mut files = Vec::new();
    if artifact.tier == Tier::Published {
        files.push(file("published", &artifact.published));
    }
    if artifact.output != artifact.published {
        files.push(file("uncompressed", &artifact.output));
    }
    let published = percent_encoding::utf8_percent_encode(&artifact.published.name, super::PATH_SET);
    Row {
        id,
        platform: artifact.platform.clone(),
        format: match &*artifact.file {
            "disk" => artifact.format.clone(),
            file => format!("{} {file}", artifact.format),
        },
        tier: artifact.tier,
        reason: artifact.not_published.clone().unwrap_or_default(),
        files,
        signature: artifact.signature.map(|_| format!("/{dir}/{published}{}", crate::catalog::SIGNATURE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_made_is_on_the_page() {
        let base: Url = "http://h/".parse().unwrap();
        let making = vec![("<disk>.xz".to_owned(), 1 << 20, 4 << 20)];
        let html = Page::new(&[], &base, making, false).render().unwrap();
        for wanted in ["\"being-prepared\">", "&#60;disk&#62;.xz: 1", "max=\"100\" value=\"25\"", "25 %"] {
            assert!(html.contains(wanted), "{wanted}: {html}");
        }
        let html = Page::new(&[], &base, Vec::new(), false).render().unwrap();
        assert!(
            html.contains("\"being-prepared\" hidden>") && html.contains("No release is served here."),
            "{html}"
        );
    }
}
