//! Serves over HTTP.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use axum::Router;

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen.
    pub listen: SocketAddr,
}

/// Serves until the process is told to end.
pub fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("cannot listen on {}", options.listen))?;
        tracing::info!("listening on {}", options.listen);
        axum::serve(listener, Router::new()).await.context("serving")
    })
}
