//! `containers-storage:NAME`, `docker-daemon:NAME`, and with `--skopeo` any other: what skopeo reads, through its image
//! proxy.
//!
//! The proxy heeds the `registries.conf` of the machine, and its `policy.json` from version 1.11 on. It gives blobs from
//! start to end only, one at a time, and the manifest of the one image that it picks, as OCI has it. Where that, or what
//! the storage of podman keeps of layers, is not what the image had, there is a manifest of what there is, with a digest
//! of its own, as of an archive of docker.

use std::io::{self, Read};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::{Buf, Bytes};
use containers_image_proxy::{Error, ImageProxy, ImageProxyConfig, OpenedImage};
use oci_spec::image::{Descriptor, ImageManifest, MediaType};
use tokio::io::AsyncReadExt;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use super::{MAX_DOCUMENT, Transport};
use crate::digest::Digest;
use crate::registry::{Manifest, Options, Reference, TRANSPORT};

/// The version of the proxy that applies `policy.json`.
const POLICY: (u64, u64, u64) = (0, 2, 6);

/// The size of a piece of a blob, in bytes.
const PIECE: usize = 256 << 10;

/// How many pieces are read ahead.
const AHEAD: usize = 4;

/// What skopeo calls places that are no registries.
const TRANSPORTS: [&str; 6] =
    ["oci", "oci-archive", "docker-archive", "dir", "containers-storage", "docker-daemon"];

/// An image that skopeo has opened.
pub(super) struct Skopeo {
    // Before the runtime, which waits for skopeo to end when it is dropped.
    shared: Arc<Shared>,
    manifest: Manifest,
    runtime: Runtime,
}

struct Shared {
    proxy: ImageProxy,
    image: OpenedImage,
}

impl Skopeo {
    pub(super) fn open(reference: &str, options: &Options) -> Result<Self> {
        let name = full(reference)?;
        let mut config = ImageProxyConfig::default();
        config.authfile.clone_from(&options.authfile);
        config.certificate_directory.clone_from(&options.cert_dir);
        config.insecure_skip_tls_verification = Some(!options.tls_verify);
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        // Not by this thread: skopeo is ended with the one that has started it.
        let opened = runtime.spawn(async move {
            let proxy = ImageProxy::new_with_config(config).await?;
            let image = proxy.open_image(&name).await?;
            let manifest = manifest(&proxy, &image, name.starts_with("containers-storage:")).await?;
            Ok((Shared { proxy, image }, manifest))
        });
        let (shared, bytes) = runtime.block_on(opened)?.map_err(told)?;
        let version = shared.proxy.protocol_version();
        if (version.major, version.minor, version.patch) < POLICY {
            const OLD: &str = "this skopeo does not apply policy.json: 1.11 does";
            ensure!(!options.skopeo, OLD);
            tracing::warn!("{OLD}");
        }
        ensure!(bytes.len() as u64 <= MAX_DOCUMENT, "a manifest of {} bytes", bytes.len());
        let manifest = Manifest { digest: Digest::of(&bytes), media_type: MediaType::ImageManifest, bytes };
        Ok(Self { shared: Arc::new(shared), manifest, runtime })
    }
}

/// What skopeo calls what `reference` names.
fn full(reference: &str) -> Result<String> {
    let transport = reference.split_once(':').map_or("", |(transport, _)| transport);
    if TRANSPORTS.contains(&transport) {
        return Ok(reference.to_owned());
    }
    let name = reference.strip_prefix(TRANSPORT).unwrap_or(reference);
    let full: Reference = name.parse()?;
    let host = name.split_once('/').map_or("", |(host, _)| host);
    ensure!(
        host == "localhost" || host.contains(['.', ':']),
        "a short name, which podman looks up in registries.conf, but skopeo does not: {full} is one with a registry"
    );
    Ok(format!("{TRANSPORT}{name}"))
}

/// An error of the proxy.
fn told(error: Error) -> anyhow::Error {
    match error {
        Error::SkopeoSpawnError(e) => anyhow::anyhow!("skopeo, which is to read it, cannot be run: {e}"),
        e => anyhow::anyhow!("skopeo: {e}"),
    }
}

/// The manifest. In the storage of podman layers are decompressed, but the manifest names them as they came.
async fn manifest(proxy: &ImageProxy, image: &OpenedImage, stored: bool) -> Result<Vec<u8>, Error> {
    let (_, bytes) = proxy.fetch_manifest_raw_oci(image).await?;
    let mut manifest: ImageManifest = serde_json::from_slice(&bytes)?;
    let config = proxy.fetch_config(image).await?;
    let diff_ids = config.rootfs().diff_ids();
    let packed = |(layer, diff_id): (&Descriptor, &String)| layer.digest().to_string() != *diff_id;
    if !stored || !manifest.layers().iter().zip(diff_ids).any(packed) {
        return Ok(bytes);
    }
    let known = proxy.get_layer_info(image).await?;
    for (number, (layer, diff_id)) in manifest.layers_mut().iter_mut().zip(diff_ids).enumerate() {
        if !packed((&*layer, diff_id)) {
            continue;
        }
        let digest = diff_id.parse().map_err(|_| Error::Other("a diff ID that is no digest".into()))?;
        let size = match known.as_ref().and_then(|layers| layers.get(number)) {
            Some(layer) => layer.size,
            // Versions before 1.14 do not tell.
            None => {
                let (mut content, finished) = proxy.get_blob(image, &digest, 0).await?;
                let mut sink = tokio::io::sink();
                // That it is longer than 0 is an error to the proxy. What it is, is checked by those who read it.
                let (len, _) = tokio::join!(tokio::io::copy_buf(&mut content, &mut sink), finished);
                len?
            }
        };
        *layer = Descriptor::new(MediaType::ImageLayer, size, digest);
    }
    Ok(serde_json::to_vec(&manifest)?)
}

impl Transport for Skopeo {
    fn root(&self) -> Result<Manifest> {
        Ok(self.manifest.clone())
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest> {
        anyhow::bail!("manifest {}: skopeo gives only that of one image", descriptor.digest())
    }

    fn part(&self, blob: &Descriptor, offset: u64, _len: u64) -> Result<Box<dyn Read + Send>> {
        let (pieces, receiver) = mpsc::channel(AHEAD);
        let (shared, descriptor) = (self.shared.clone(), blob.clone());
        self.runtime.spawn(async move {
            if let Err(e) = read(&shared, &descriptor, &pieces).await {
                // Whoever does not read any more is not interested.
                let _ = pieces.send(Err(io::Error::other(format!("skopeo: {e}")))).await;
            }
        });
        let mut content = Content { receiver, piece: Bytes::new() };
        io::copy(&mut (&mut content).take(offset), &mut io::sink())
            .with_context(|| format!("blob {}", blob.digest()))?;
        Ok(Box::new(content))
    }

    /// It takes a blob from its start to get at any byte of it.
    fn local(&self) -> bool {
        false
    }
}

/// Sends all of a blob, in pieces. That it is the right one is checked by the proxy, too.
async fn read(
    shared: &Shared,
    blob: &Descriptor,
    pieces: &mpsc::Sender<io::Result<Bytes>>,
) -> Result<(), Error> {
    let (mut content, finished) = shared.proxy.get_blob(&shared.image, blob.digest(), blob.size()).await?;
    let pass = async move {
        loop {
            let mut piece = vec![0; PIECE];
            let n = content.read(&mut piece).await?;
            piece.truncate(n);
            if n == 0 || pieces.send(Ok(piece.into())).await.is_err() {
                // The other side notices that nobody reads.
                return io::Result::Ok(());
            }
        }
    };
    // There is no end before the proxy is asked to finish.
    let (passed, finished) = tokio::join!(pass, finished);
    passed?;
    finished
}

/// The content of a blob.
struct Content {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for Content {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let n = buf.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::full;

    #[test]
    fn names() {
        for name in [
            "quay.io/x/y:z",
            "localhost/x",
            "h:80/x@sha256:0000000000000000000000000000000000000000000000000000000000000000",
        ] {
            assert_eq!(full(name).unwrap(), format!("docker://{name}"));
            assert_eq!(full(&format!("docker://{name}")).unwrap(), format!("docker://{name}"));
        }
        for name in ["containers-storage:[vfs@/a+/b]h/x:1", "oci:a:b", "docker-daemon:x:1"] {
            assert_eq!(full(name).unwrap(), name);
        }
        for name in ["ubuntu", "docker://ubuntu:18.04", "library/ubuntu"] {
            let e = full(name).unwrap_err().to_string();
            assert!(e.contains("docker.io/library/ubuntu:"), "{e}");
        }
    }
}
