//! Lookups of repositories that nobody has asked for before: how many clients may have the registry make at a time.
//!
//! A client may guess names. Each guess is a request to the registry, so few are made at once for one client, and few for
//! all; refreshes of repositories that exist do not wait behind them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Lookups that are made at once for all clients.
const MAX_LOOKUPS: usize = 8;

/// Lookups that are made at once for one client: half, so that none can take all.
const MAX_OF_CLIENT: usize = MAX_LOOKUPS / 2;

/// The longest that a lookup waits for its turn.
const WAIT: Duration = Duration::from_secs(10);

/// A client: its address, or the network of an IPv6 address, of which a client has as many as it wants.
type Client = Option<IpAddr>;

/// The turns of clients.
pub(super) struct Lookups {
    all: Arc<Semaphore>,
    /// Those who look something up, or wait.
    clients: Mutex<HashMap<Client, Weak<Semaphore>>>,
    wait: Duration,
}

/// A lookup may be made as long as this lives.
pub(super) struct Turn {
    _of_client: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Default for Lookups {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(MAX_LOOKUPS)), clients: Mutex::default(), wait: WAIT }
    }
}

impl Lookups {
    /// Waits for the turn of the client at `address`; none when it takes too long.
    pub(super) async fn turn(&self, address: Option<IpAddr>) -> Option<Turn> {
        let own = self.of_client(address.map(network));
        let turn = async {
            let of_client = own.acquire_owned().await.ok()?;
            let of_all = self.all.clone().acquire_owned().await.ok()?;
            Some(Turn { _of_client: of_client, _of_all: of_all })
        };
        tokio::time::timeout(self.wait, turn).await.ok().flatten()
    }

    fn of_client(&self, client: Client) -> Arc<Semaphore> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = clients.get(&client).and_then(Weak::upgrade) {
            return own;
        }
        // Those who do not wait any more: as many as others that wait remain, at most.
        clients.retain(|_, own| own.strong_count() > 0);
        let own = Arc::new(Semaphore::new(MAX_OF_CLIENT));
        clients.insert(client, Arc::downgrade(&own));
        own
    }
}

/// The address, or the /64 network of an IPv6 address.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & (u128::MAX << 64)).into()),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_leaves_turns_to_others() {
        let lookups = Lookups { wait: Duration::from_millis(20), ..Lookups::default() };
        let at = |text: &str| Some(text.parse().unwrap());
        let mut turns = Vec::new();
        for n in 0..MAX_OF_CLIENT {
            // All of them are one client.
            turns.push(lookups.turn(at(&format!("2001:db8::{n}"))).await.unwrap());
        }
        assert!(lookups.turn(at("2001:db8::ffff:1")).await.is_none());
        for _ in 0..MAX_LOOKUPS - MAX_OF_CLIENT {
            turns.push(lookups.turn(at("192.0.2.1")).await.unwrap());
        }
        assert!(lookups.turn(at("::ffff:192.0.2.1")).await.is_none());
        assert!(lookups.turn(at("192.0.2.2")).await.is_none());
        assert_eq!(lookups.clients.lock().unwrap().len(), 3);
        turns.clear();
        assert!(lookups.turn(None).await.is_some());
        assert_eq!(lookups.clients.lock().unwrap().len(), 1);
    }
}
