//! Work that blocks, bounded by kind, so that no kind waits behind another: reads of chunks never wait behind makers.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// A request has waited for its turn for as long as one may.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("too much is being done at the moment: waited {} s for a turn; retry later", .0.as_secs())]
pub struct Busy(pub Duration);

/// Threads for one kind of work.
#[derive(Clone)]
pub struct Pool {
    threads: Arc<Semaphore>,
    patience: Option<Duration>,
}

impl Pool {
    /// `threads` of them; work waits no longer than `patience` for one.
    pub fn new(threads: usize, patience: Option<Duration>) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads.max(1))), patience }
    }

    /// Does `work` on a thread. Once begun, it goes on when nobody waits for it any more.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let turn = self.threads.clone().acquire_owned();
        let permit = match self.patience {
            None => turn.await?,
            Some(patience) => timeout(patience, turn).await.map_err(|_| Busy(patience))??,
        };
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        Ok(done.await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_waits_for_its_turn_and_not_for_ever() {
        let pool = Pool::new(1, Some(Duration::from_millis(20)));
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(move || wait.recv()).await }
        });
        tokio::task::yield_now().await;
        let refused = pool.run(|| ()).await.unwrap_err();
        assert!(refused.downcast_ref::<Busy>().is_some(), "{refused}");
        go_on.send(()).unwrap();
        first.await.unwrap().unwrap().unwrap();
        pool.run(|| ()).await.unwrap();
    }
}
