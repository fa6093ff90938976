//! What comes from outside, and no more of it than is sensible: lists in JSON, names in messages.

use std::fmt::{self, Display};
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// The most names that a message lists.
const MAX_NAMES: usize = 20;

/// The most characters of a name that a message shows.
const MAX_SHOWN: usize = 200;

/// A list of at most `N` entries. A longer one is an error as soon as its entry `N + 1` is read, so that a document of a few
/// megabytes does not become a list of a hundred.
#[derive(Debug)]
pub struct AtMost<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for AtMost<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for AtMost<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T, const N: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for List<T, N> {
            type Value = AtMost<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} entries")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(entry) = entries.next_element()? {
                    if all.len() == N {
                        return Err(A::Error::custom(format_args!("a list of more than {N} entries")));
                    }
                    all.push(entry);
                }
                Ok(AtMost(all))
            }
        }
        deserializer.deserialize_seq(List(PhantomData))
    }
}

/// Names for a message: the first of them, and how many more there are.
pub fn names<N: Display>(names: impl IntoIterator<Item = N>) -> String {
    let mut names = names.into_iter();
    let first: Vec<_> =
        names.by_ref().take(MAX_NAMES).map(|name| shown(name.to_string().as_bytes())).collect();
    match names.count() {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

/// A name for a message, cut where it is longer than anybody reads.
pub fn shown(name: &[u8]) -> String {
    // A character has at most four bytes; no more of a long name is looked at.
    let text = String::from_utf8_lossy(&name[..name.len().min(4 * MAX_SHOWN)]);
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], name.len()),
        None => text.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_end_at_their_bound() {
        assert_eq!(serde_json::from_str::<AtMost<u8, 3>>("[1,2,3]").unwrap().0, [1, 2, 3]);
        let e = serde_json::from_str::<AtMost<u8, 3>>("[1,2,3,4]").unwrap_err().to_string();
        assert!(e.starts_with("a list of more than 3 entries"), "{e}");
        assert!(serde_json::from_str::<AtMost<u8, 3>>("{}").is_err());
    }

    #[test]
    fn messages_stay_short() {
        assert_eq!(names(["a", "b"]), "a, b");
        assert!(names(0..1000).ends_with("19 and 980 more"));
        assert_eq!(shown("ä".repeat(MAX_SHOWN).as_bytes()), "ä".repeat(MAX_SHOWN));
        let long = shown("ä".repeat(1 << 20).as_bytes());
        assert_eq!(long, format!("{}… (2097152 bytes)", "ä".repeat(MAX_SHOWN)));
        assert!(shown(&[0xFF; 5000]).ends_with("(5000 bytes)"));
    }
}
