//! Holds the modules to the direction of the flow: each may import only from itself and from those before it.
//! Data that flows one way can be followed; a newcomer reads the list from the top.

use std::fs;
use std::path::Path;

/// The modules in the order of the flow.
const ORDER: &[&str] = &[
    "bytes",
    "decompress",
    "digest",
    "io",
    "staging",
    "bounded",
    "memory",
    "terminal",
    "progress",
    "version",
    "stream",
    "catalog",
    "openpgp",
    "http",
    "registry",
    "untar",
    "transport",
    "workdir",
    "fetch",
    "download",
    "source",
    "fold",
    "recipe",
    "store",
    "oci",
    "sink",
    "produce",
    "inspect",
    "rehydrate",
    "extract",
    "verify",
    "proof",
    "dehydrate",
    "report",
    "mirror",
    "pull",
    "copy",
    "serve",
    "cli",
    "main",
    "lib",
];

fn position(module: &str) -> usize {
    ORDER
        .iter()
        .position(|m| *m == module)
        .unwrap_or_else(|| panic!("module {module} has no place in the flow: tests/imports.rs"))
}

fn check(dir: &Path, module: Option<&str>, wrong: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            continue;
        }
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let module = module.unwrap_or(&stem);
        if path.is_dir() {
            // The engine is a crate of its own, with modules of its own; preflate is somebody else's crate.
            match module {
                "preflate" => {}
                "engine" => check(&path, None, wrong),
                module => check(&path, Some(module), wrong),
            }
            continue;
        }
        for line in fs::read_to_string(&path).unwrap().lines().filter(|l| !l.trim_start().starts_with("//")) {
            for (at, found) in line.match_indices("crate::") {
                let imported: String = line[at + found.len()..]
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                if !imported.is_empty() && position(&imported) > position(module) {
                    wrong.push(format!(
                        "{}: {} imports {imported}, which comes after it",
                        path.display(),
                        module
                    ));
                }
            }
        }
    }
}

#[test]
fn imports_point_backwards() {
    let mut wrong = vec![];
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), None, &mut wrong);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
