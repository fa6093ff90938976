//! Who is served: clients by address, and the places that they share, such as connections and downloads.
//!
//! There is a number of places for all clients, and one for each. When all are taken, the client that has most of them
//! loses one to a client that has fewer, and what has been idle or stalled for longest goes first. So no client can keep
//! the others out, however many places it asks for, and accepting never waits.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A busy place in which nothing moved for so long may be given to another client.
const STALE: Duration = Duration::from_secs(5);

/// A client, as far as the address tells it from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    /// An IPv4 address, or the network (/64) of an IPv6 address: a site has one of these, and all addresses in it.
    Remote(IpAddr),
    /// A socket of the file system. What is at its other end, usually a proxy, speaks for all clients: the number of
    /// places for one client is not applied to it.
    Local,
}

impl Client {
    /// The client at this address; none is a socket of the file system.
    pub fn of(peer: Option<SocketAddr>) -> Self {
        match peer.map(|peer| peer.ip().to_canonical()) {
            None => Self::Local,
            Some(IpAddr::V6(ip)) => {
                let [a, b, c, d, ..] = ip.segments();
                Self::Remote(IpAddr::from([a, b, c, d, 0, 0, 0, 0]))
            }
            Some(ip) => Self::Remote(ip),
        }
    }
}

/// When something moved last, and whether anything is still expected to.
#[derive(Debug)]
pub struct Activity {
    started: Instant,
    /// In milliseconds since `started`.
    last: AtomicU64,
    busy: AtomicUsize,
}

impl Default for Activity {
    fn default() -> Self {
        Self { started: Instant::now(), last: AtomicU64::new(0), busy: AtomicUsize::new(0) }
    }
}

impl Activity {
    /// Something moved.
    pub fn touch(&self) {
        self.last.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Something begins.
    pub fn begin(&self) {
        self.touch();
        self.busy.fetch_add(1, Ordering::Relaxed);
    }

    /// It ended.
    pub fn end(&self) {
        self.touch();
        self.busy.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether nothing is going on.
    pub fn is_idle(&self) -> bool {
        self.busy.load(Ordering::Relaxed) == 0
    }

    /// How long nothing moved.
    pub fn quiet(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last)
    }
}

/// No place is free, nor can one be made free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The client has as many as one client may have.
    #[error("this client has {0} already, which is the limit for one client; retry later")]
    Client(usize),
    /// All of them are taken.
    #[error("all {0} are taken; retry later")]
    All(usize),
}

/// Ends what a place was taken for.
type Leave = Box<dyn Fn() + Send + Sync>;

struct Seat {
    activity: Arc<Activity>,
    leave: Leave,
}

impl Seat {
    /// Whether another may have it, whoever has more places.
    fn may_go(&self) -> bool {
        self.activity.is_idle() || self.activity.quiet() >= STALE
    }
}

#[derive(Default)]
struct State {
    seats: HashMap<Client, Vec<Arc<Seat>>>,
    taken: usize,
}

impl State {
    fn of(&self, client: Client) -> &[Arc<Seat>] {
        self.seats.get(&client).map_or(&[], Vec::as_slice)
    }

    /// False if it has been taken away already.
    fn remove(&mut self, client: Client, seat: &Arc<Seat>) -> bool {
        let Some(seats) = self.seats.get_mut(&client) else { return false };
        let Some(at) = seats.iter().position(|other| Arc::ptr_eq(other, seat)) else { return false };
        seats.swap_remove(at);
        if seats.is_empty() {
            self.seats.remove(&client);
        }
        self.taken -= 1;
        true
    }
}

/// The one to go first: one that is idle, and of those the one that has been quiet for longest.
fn first_to_go<'a>(seats: impl IntoIterator<Item = &'a Arc<Seat>>) -> Option<&'a Arc<Seat>> {
    seats.into_iter().max_by_key(|seat| (seat.activity.is_idle(), seat.activity.quiet()))
}

/// Places that all clients share.
pub struct Places {
    total: usize,
    per_client: usize,
    state: Mutex<State>,
}

/// A place, free again when this is dropped.
pub struct Place {
    places: Arc<Places>,
    client: Client,
    seat: Arc<Seat>,
}

impl Places {
    /// `total` places, of which a client may have `per_client`; 0 is no limit for one client.
    pub fn new(total: usize, per_client: usize) -> Arc<Self> {
        let per_client = if per_client == 0 { usize::MAX } else { per_client };
        Arc::new(Self { total: total.max(1), per_client, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for `client`. If it must be given to another, `leave` is called, which must not block.
    pub fn enter(
        self: &Arc<Self>,
        client: Client,
        activity: Arc<Activity>,
        leave: impl Fn() + Send + Sync + 'static,
    ) -> Result<Place, Full> {
        let mut state = self.state();
        let own = state.of(client).len();
        let victim = if own >= self.per_client && client != Client::Local {
            let seat = first_to_go(state.of(client)).filter(|seat| seat.may_go());
            Some((client, seat.ok_or(Full::Client(self.per_client))?.clone()))
        } else if state.taken >= self.total {
            let (who, seat) = self.of_others(&state, own).ok_or(Full::All(self.total))?;
            Some((who, seat.clone()))
        } else {
            None
        };
        if let Some((who, seat)) = &victim {
            state.remove(*who, seat);
        }
        let seat = Arc::new(Seat { activity, leave: Box::new(leave) });
        state.seats.entry(client).or_default().push(seat.clone());
        state.taken += 1;
        drop(state);
        if let Some((_, seat)) = victim {
            (seat.leave)();
        }
        Ok(Place { places: self.clone(), client, seat })
    }

    /// When all are taken: the place that a client with `own` places may have.
    fn of_others<'a>(&self, state: &'a State, own: usize) -> Option<(Client, &'a Arc<Seat>)> {
        let remote = state.seats.iter().filter(|(client, _)| **client != Client::Local);
        if let Some((client, seats)) = remote.max_by_key(|(_, seats)| seats.len())
            && let Some(seat) = first_to_go(seats)
            && (seats.len() > own + 1 || seat.may_go())
        {
            return Some((*client, seat));
        }
        let all = state.seats.iter().filter_map(|(client, seats)| Some((*client, first_to_go(seats)?)));
        all.filter(|(_, seat)| seat.may_go()).max_by_key(|(_, seat)| seat.activity.quiet())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.state().remove(self.client, &self.seat);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u8) -> Client {
        Client::of(Some(SocketAddr::from(([192, 0, 2, n], 1000))))
    }

    /// Takes a place in which something is going on, or not; and tells whether it was taken away again.
    fn enter(places: &Arc<Places>, n: u8, busy: bool) -> Result<(Place, Arc<AtomicUsize>), Full> {
        let (activity, left) = (Arc::<Activity>::default(), Arc::<AtomicUsize>::default());
        if busy {
            activity.begin();
        }
        let count = left.clone();
        let place = places.enter(client(n), activity, move || {
            count.fetch_add(1, Ordering::Relaxed);
        })?;
        Ok((place, left))
    }

    fn left(seats: &[(Place, Arc<AtomicUsize>)]) -> usize {
        seats.iter().map(|(_, left)| left.load(Ordering::Relaxed)).sum()
    }

    #[test]
    fn addresses_of_one_site_are_one_client() {
        let of = |text: &str| Client::of(Some(text.parse().unwrap()));
        assert_eq!(of("[2001:db8::1]:1"), of("[2001:db8::ffff:2]:2"));
        assert_ne!(of("[2001:db8::1]:1"), of("[2001:db8:0:1::1]:1"));
        assert_eq!(of("[::ffff:192.0.2.1]:1"), of("192.0.2.1:2"));
        assert_ne!(of("192.0.2.1:1"), of("192.0.2.2:1"));
    }

    #[test]
    fn a_client_has_no_more_than_its_places() {
        let places = Places::new(10, 3);
        let _three: Vec<_> = (0..3).map(|_| enter(&places, 1, true).unwrap()).collect();
        assert_eq!(enter(&places, 1, true).err(), Some(Full::Client(3)));
        assert!(enter(&places, 2, true).is_ok());
        let unlimited = Places::new(10, 0);
        let ten: Vec<_> = (0..10).map(|_| enter(&unlimited, 1, true).unwrap()).collect();
        assert_eq!(enter(&unlimited, 1, true).err(), Some(Full::All(10)));
        drop(ten);
        assert!(enter(&unlimited, 1, true).is_ok());
    }

    #[test]
    fn an_idle_place_goes_first() {
        let places = Places::new(10, 3);
        let mut seats: Vec<_> = [true, false, true].map(|busy| enter(&places, 1, busy).unwrap()).into();
        seats.push(enter(&places, 1, true).unwrap());
        assert_eq!(seats[1].1.load(Ordering::Relaxed), 1);
        assert_eq!(left(&seats), 1);
        // The place that was taken away is not given back a second time.
        drop(seats);
        assert_eq!(places.state().taken, 0);
    }

    #[test]
    fn who_has_most_makes_room_for_who_has_fewer() {
        let places = Places::new(4, 0);
        let mut seats: Vec<_> = (0..4).map(|_| enter(&places, 1, true).unwrap()).collect();
        seats.push(enter(&places, 2, true).unwrap());
        seats.push(enter(&places, 2, true).unwrap());
        assert_eq!(left(&seats[..4]), 2);
        // Both have two.
        assert_eq!(enter(&places, 1, true).err(), Some(Full::All(4)));
        assert_eq!(enter(&places, 2, true).err(), Some(Full::All(4)));
        // A third client has none yet.
        assert!(enter(&places, 3, true).is_ok());
    }

    #[test]
    fn a_local_proxy_is_no_single_client() {
        let places = Places::new(3, 1);
        let local = || {
            let activity = Arc::<Activity>::default();
            activity.begin();
            places.enter(Client::Local, activity, || {})
        };
        let _three: Vec<_> = (0..3).map(|_| local().unwrap()).collect();
        assert_eq!(local().err(), Some(Full::All(3)));
        assert_eq!(enter(&places, 1, true).err(), Some(Full::All(3)));
    }
}
