//! The repositories that have been asked for: those that exist, and those that do not.
//!
//! What is remembered is bounded, in number and in memory together. A repository that does not exist goes first, then the one
//! that has been asked for least recently. To forget one costs the registry requests, and nothing else.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::Mutex as AsyncMutex;

use super::listing::{Listing, State};
use super::pairs::Pairs;
use crate::registry::Reference;

/// The most repositories that are remembered, those that do not exist included.
const MAX_REPOSITORIES: usize = 1000;

/// About the most memory that all of them take, in bytes: a dozen with tens of thousands of files, or a thousand with hundreds.
/// One repository alone may take as much as the bounds of a listing allow.
const MAX_MEMORY: usize = 128 << 20;

/// A repository that was asked for.
pub(super) struct Repository {
    pub(super) reference: Reference,
    /// Which key signs its list.
    pub(super) key: Option<usize>,
    pub(super) state: Arc<AsyncMutex<State>>,
    pub(super) pairs: Pairs<Listing>,
    use_: Mutex<Use>,
}

#[derive(Clone, Copy)]
struct Use {
    /// Whether it had a listing when the registry was asked last.
    exists: bool,
    memory: usize,
    last: Instant,
}

impl Repository {
    pub(super) fn new(reference: Reference, key: Option<usize>) -> Self {
        let use_ = Use { exists: false, memory: 0, last: Instant::now() };
        let (state, pairs) = (Arc::default(), Pairs::default());
        Self { reference, key, state, pairs, use_: Mutex::new(use_) }
    }

    /// The last component of its name, with which the names of its files begin.
    pub(super) fn last(&self) -> &str {
        self.reference.repository().rsplit('/').next().unwrap_or_default()
    }

    pub(super) fn exists(&self) -> bool {
        self.with_use(|use_| use_.exists)
    }

    fn with_use<T>(&self, f: impl FnOnce(&mut Use) -> T) -> T {
        f(&mut self.use_.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The repositories by their names.
#[derive(Default)]
pub(super) struct Repositories(Mutex<HashMap<String, Arc<Repository>>>);

impl Repositories {
    /// The repository of this name, which `make` makes if it is new and can be one.
    pub(super) fn get(
        &self,
        name: &str,
        make: impl FnOnce() -> Option<Repository>,
    ) -> Option<Arc<Repository>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.get(name) {
            known.with_use(|use_| use_.last = Instant::now());
            return Some(known.clone());
        }
        let new = Arc::new(make()?);
        while all.len() >= MAX_REPOSITORIES && forget_one(&mut all) {}
        // If all of them are in use, this one is asked for without being remembered.
        if all.len() < MAX_REPOSITORIES {
            all.insert(name.to_owned(), new.clone());
        }
        Some(new)
    }

    /// Notes what the registry said of `repository`: whether it has a listing, and how much memory that takes. Others are
    /// forgotten where it is too much for all.
    pub(super) fn note(&self, repository: &Repository, exists: bool, memory: usize) {
        repository.with_use(|use_| (use_.exists, use_.memory) = (exists, memory));
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = |all: &HashMap<String, Arc<Repository>>| {
            all.values().map(|known| known.with_use(|use_| use_.memory)).sum::<usize>()
        };
        while taken(&all) > MAX_MEMORY && forget_one(&mut all) {}
    }

    /// Another repository with this key whose files may have the same names; of several the one whose name is most alike.
    pub(super) fn confusable(&self, repository: &Repository) -> Option<Arc<Repository>> {
        let begins = |long: &str, short: &str| {
            long.strip_prefix(short).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_']))
        };
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_like = |other: &&Arc<Repository>| {
            other.key == repository.key
                && other.exists()
                && other.reference != repository.reference
                && (begins(other.last(), repository.last()) || begins(repository.last(), other.last()))
        };
        let alike = |other: &&Arc<Repository>| (other.last().len(), Reverse(other.reference.name()));
        all.values().filter(is_like).max_by_key(alike).cloned()
    }
}

/// Forgets a repository that no request is about: false if there is none.
fn forget_one(all: &mut HashMap<String, Arc<Repository>>) -> bool {
    let idle = all.iter().filter(|(_, known)| Arc::strong_count(known) == 1);
    let oldest = idle.min_by_key(|(_, known)| known.with_use(|use_| (use_.exists, use_.last)));
    let Some(name) = oldest.map(|(name, _)| name.clone()) else { return false };
    all.remove(&name).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(name: &str) -> Option<Repository> {
        Some(Repository::new(format!("h.io/{name}").parse().unwrap(), None))
    }

    #[test]
    fn guesses_displace_only_guesses() {
        let all = Repositories::default();
        let has = |name: &str| all.0.lock().unwrap().contains_key(name);
        let real = all.get("real", || repository("real")).unwrap();
        all.note(&real, true, 1000);
        drop(real);
        for n in 0..3 * MAX_REPOSITORIES {
            let name = format!("guess-{n}");
            all.get(&name, || repository(&name)).unwrap();
        }
        assert_eq!(all.0.lock().unwrap().len(), MAX_REPOSITORIES);
        assert!(has("real") && has("guess-2999") && !has("guess-2000"));
        assert!(all.get("bad", || None).is_none());
    }

    #[test]
    fn memory_of_all_together_is_bounded() {
        let all = Repositories::default();
        let names: Vec<_> = (0..10).map(|n| format!("r{n}")).collect();
        for name in &names {
            let new = all.get(name, || repository(name)).unwrap();
            all.note(&new, true, MAX_MEMORY / 4);
        }
        let kept = |all: &Repositories| all.0.lock().unwrap().len();
        assert_eq!(kept(&all), 4);
        // One in use stays, however large.
        let held = all.get("r9", || None).unwrap();
        all.note(&held, true, 2 * MAX_MEMORY);
        assert_eq!(kept(&all), 1);
        assert!(Arc::ptr_eq(&held, &all.get("r9", || None).unwrap()));
    }

    #[test]
    fn names_that_other_repositories_can_have() {
        let all = Repositories::default();
        for name in ["a/os", "b/os-disk", "c/osx", "d/other"] {
            let new = all.get(name, || repository(name)).unwrap();
            all.note(&new, true, 1);
        }
        let like = |name: &str| {
            let like = all.confusable(&repository(name).unwrap());
            like.map(|like| like.reference.repository().to_owned())
        };
        assert_eq!(like("x/other").as_deref(), Some("d/other"));
        assert_eq!(like("x/os-disk-2").as_deref(), Some("b/os-disk"));
        assert_eq!(like("x/o").as_deref(), None);
        assert_eq!(like("d/other").as_deref(), None);
    }
}
