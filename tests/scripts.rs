//! The scripts in `ci/`, as far as they can be judged without the systems they are for.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Fedora cannot be tried here: each of its packages that `ci/deps` installs is one of those that were looked up.
#[test]
fn packages_of_fedora_are_known_ones() {
    let ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("ci");
    let read = |name: &str| fs::read_to_string(ci.join(name)).unwrap();
    let known = read("fedora-packages");
    let known: BTreeSet<&str> = known.lines().filter(|line| !line.starts_with('#')).collect();
    let deps = read("deps");
    let table = deps.split("<<'TABLE'\n").nth(1).unwrap().split("\nTABLE").next().unwrap();
    for row in table.lines() {
        let columns: Vec<&str> = row.split_whitespace().collect();
        let [_, tool, _, fedora] = columns[..] else { panic!("four columns are wanted: {row}") };
        assert!(fedora == "-" || known.contains(fedora), "{tool}: ci/fedora-packages lacks {fedora}");
    }
}
