//! Gives every client a `SHA256SUMS` and a `SHA256SUMS.gpg` that fit.
//!
//! The two are asked for by separate requests, one after the other or both at once, on one connection or two; nothing in
//! them says that they belong together but who asks. So it is counted by client how many of either it got from the
//! listing it has. While a half is missing, the client stays with that listing: the other half comes from it, however
//! many tags have been pushed meanwhile. A request that would begin another pair with the old listing waits until those
//! that were begun are whole, so that a client that asks without a pause gets to the new listing too.
//!
//! Nothing here keeps a listing: a client whose listing is gone, because there have been too many since, gets the newest.
//!
//! A client that never asks for signatures never makes a pair whole: it is not waited for after [`WAIT`], and what it
//! began more than [`OPEN`] ago does not count.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Time after which the other half of a pair is not expected any more.
const OPEN: Duration = Duration::from_secs(30);

/// The longest that a request waits for pairs to become whole.
const WAIT: Duration = Duration::from_secs(10);

/// How long after its last pair a client gets the files of the listing it has.
const FILES: Duration = Duration::from_secs(15 * 60);

/// The most clients of a repository that are remembered.
const MAX_CLIENTS: usize = 10_000;

/// One of the two, or the first where there is no second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Sums,
    Signature,
    Alone,
}

/// What the clients of a repository have got. `L` is a listing.
pub(super) struct Pairs<L> {
    /// By a hash of what they are: a number, however long that is. Only the choice between two listings depends on it.
    clients: Mutex<HashMap<u64, Pair<L>>>,
    hasher: RandomState,
    /// A pair has become whole.
    whole: Notify,
    wait: Duration,
}

struct Pair<L> {
    listing: Weak<L>,
    /// So many more sums than signatures of it were given.
    open: i64,
    last: Instant,
}

impl<L> Default for Pairs<L> {
    fn default() -> Self {
        Self { clients: Mutex::default(), hasher: RandomState::new(), whole: Notify::new(), wait: WAIT }
    }
}

impl<L> Pairs<L> {
    /// The listing that `client` gets this half of, `current` if possible.
    pub(super) async fn choose(&self, client: &str, current: Arc<L>, half: Half) -> Arc<L> {
        let step = match half {
            Half::Sums => 1,
            Half::Signature => -1,
            Half::Alone => 0,
        };
        let client = self.hasher.hash_one(client);
        let deadline = Instant::now() + self.wait;
        loop {
            let waiting = {
                let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
                let now = Instant::now();
                if clients.len() >= MAX_CLIENTS && !clients.contains_key(&client) {
                    clients.retain(|_, pair| pair.last + OPEN > now);
                    if clients.len() >= MAX_CLIENTS {
                        return current;
                    }
                }
                let pair = clients.entry(client).or_insert_with(|| Pair {
                    listing: Arc::downgrade(&current),
                    open: 0,
                    last: now,
                });
                if pair.last + OPEN <= now {
                    pair.open = 0;
                }
                let held = pair.listing.upgrade().filter(|held| !Arc::ptr_eq(held, &current));
                let held = held.filter(|_| pair.open != 0 && now < deadline);
                if held.is_none() && !std::ptr::eq(pair.listing.as_ptr(), Arc::as_ptr(&current)) {
                    (pair.listing, pair.open) = (Arc::downgrade(&current), 0);
                }
                if held.is_none() || pair.open.signum() == -step {
                    pair.open += step;
                    pair.last = now;
                    if pair.open == 0 {
                        self.whole.notify_waiters();
                    }
                    return held.unwrap_or(current);
                }
                self.whole.notified()
            };
            let _ = tokio::time::timeout_at(deadline.into(), waiting).await;
        }
    }

    /// About what the clients take, in bytes.
    pub(super) fn memory(&self) -> usize {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.capacity() * size_of::<(u64, Pair<L>)>()
    }

    /// The listing that `client` has got not long ago.
    pub(super) fn of(&self, client: &str) -> Option<Arc<L>> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let pair = clients.get(&self.hasher.hash_one(client)).filter(|pair| pair.last.elapsed() < FILES)?;
        pair.listing.upgrade()
    }
}

#[cfg(test)]
mod tests {
    use super::Half::{Signature, Sums};
    use super::*;

    #[tokio::test]
    async fn both_halves_are_of_one_listing() {
        let pairs = Pairs::default();
        let (old, new) = (Arc::new(1), Arc::new(2));
        for (first, second) in [(Sums, Signature), (Signature, Sums)] {
            assert_eq!(*pairs.choose("a", old.clone(), first).await, 1);
            assert_eq!(*pairs.choose("b", new.clone(), first).await, 2);
            assert_eq!(*pairs.choose("a", new.clone(), second).await, 1);
            assert_eq!(pairs.of("a").as_deref(), Some(&1));
            assert_eq!(*pairs.choose("a", new.clone(), first).await, 2);
            assert_eq!(*pairs.choose("a", new.clone(), second).await, 2);
            assert_eq!(*pairs.choose("b", new.clone(), second).await, 2);
        }
        assert!(pairs.of("c").is_none());
    }

    #[tokio::test]
    async fn who_begins_a_pair_waits_for_those_before() {
        let pairs = Arc::new(Pairs::default());
        let (old, new) = (Arc::new(1), Arc::new(2));
        pairs.choose("a", old.clone(), Sums).await;
        let (waits, current) = (pairs.clone(), new.clone());
        let waiting = tokio::spawn(async move { *waits.choose("a", current, Sums).await });
        tokio::task::yield_now().await;
        assert_eq!(*pairs.choose("a", new.clone(), Signature).await, 1);
        assert_eq!(waiting.await.unwrap(), 2);
        assert_eq!(*pairs.choose("a", new, Signature).await, 2);
    }

    #[tokio::test]
    async fn a_listing_that_is_gone_is_replaced() {
        let pairs = Pairs::default();
        pairs.choose("a", Arc::new(1), Sums).await;
        assert!(pairs.of("a").is_none());
        let new = Arc::new(2);
        assert_eq!(*pairs.choose("a", new.clone(), Sums).await, 2);
        assert_eq!(pairs.of("a").as_deref(), Some(&2));
    }

    #[tokio::test]
    async fn nobody_waits_for_who_takes_no_signatures() {
        let pairs = Pairs { wait: Duration::ZERO, ..Pairs::default() };
        let (old, new) = (Arc::new(1), Arc::new(2));
        pairs.choose("a", old.clone(), Sums).await;
        assert_eq!(*pairs.choose("a", new, Sums).await, 2);
    }
}
