//! Serves over HTTP.

pub mod sysupdate;

use std::net::SocketAddr;

use anyhow::{Context, Result};
use axum::Router;

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen.
    pub listen: SocketAddr,
    /// What [`sysupdate::router`] gives, if it is wanted.
    pub sysupdate: Option<Router>,
}

/// Serves until the process is told to end.
pub fn run(options: Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("cannot listen on {}", options.listen))?;
        let address = listener.local_addr().context("address")?;
        tracing::info!("listening on {address}");
        let app = options.sysupdate.unwrap_or_default();
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        axum::serve(listener, app).await.context("serving")
    })
}
