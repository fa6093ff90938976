//! `containers-storage:NAME` and `docker-daemon:NAME`: what only skopeo can read, through its image proxy.
//!
//! The proxy applies the `policy.json` of the machine. It gives blobs from start to end only, and the manifest of the one
//! image that it picks.

use std::io::{self, Read};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::{Buf, Bytes};
use containers_image_proxy::{Error, ImageProxy, OpenedImage};
use oci_spec::image::{Descriptor, MediaType};
use tokio::io::AsyncReadExt;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use super::{MAX_DOCUMENT, Transport};
use crate::registry::Manifest;

/// The size of a piece of a blob, in bytes.
const PIECE: usize = 256 << 10;

/// How many pieces are read ahead.
const AHEAD: usize = 4;

/// An image that skopeo has opened.
pub(super) struct Skopeo {
    shared: Arc<Shared>,
    manifest: Manifest,
    runtime: Runtime,
}

struct Shared {
    proxy: ImageProxy,
    image: OpenedImage,
}

impl Skopeo {
    pub(super) fn open(reference: &str) -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (proxy, image, digest, bytes) = runtime
            .block_on(async {
                let proxy = ImageProxy::new().await?;
                let image = proxy.open_image(reference).await?;
                let (digest, bytes) = proxy.fetch_manifest_raw_oci(&image).await?;
                Ok((proxy, image, digest, bytes))
            })
            .map_err(|e| match e {
                Error::SkopeoSpawnError(e) => anyhow::anyhow!("skopeo, which reads it, cannot be run: {e}"),
                e => anyhow::anyhow!("skopeo: {e}"),
            })?;
        ensure!(bytes.len() as u64 <= MAX_DOCUMENT, "a manifest of {} bytes", bytes.len());
        let digest = digest.parse().context("manifest")?;
        let manifest = Manifest { bytes, media_type: MediaType::ImageManifest, digest };
        Ok(Self { shared: Arc::new(Shared { proxy, image }), manifest, runtime })
    }
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
        let (shared, blob) = (self.shared.clone(), blob.clone());
        self.runtime.spawn(async move {
            if let Err(e) = read(&shared, &blob, &pieces).await {
                // Whoever does not read any more is not interested.
                let _ = pieces.send(Err(io::Error::other(format!("skopeo: {e}")))).await;
            }
        });
        let mut content = Content { receiver, piece: Bytes::new() };
        io::copy(&mut (&mut content).take(offset), &mut io::sink())?;
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
    let (mut reader, finished) = shared.proxy.get_blob(&shared.image, blob.digest(), blob.size()).await?;
    loop {
        let mut piece = vec![0; PIECE];
        let n = reader.read(&mut piece).await?;
        piece.truncate(n);
        if n == 0 || pieces.send(Ok(piece.into())).await.is_err() {
            break;
        }
    }
    drop(reader);
    finished.await
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
