//! The page of `serve` in a browser, on a release of full size: what page.mjs says. It leaves pictures in
//! `target/screenshots/`.

use std::path::Path;

use crate::tools::example::{ok, release, tool};
use crate::tools::serve::Serve;
use crate::tools::small::sh;

#[test]
fn the_page_in_a_browser() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (modules, pictures) = (root.join("target/browser"), root.join("target/screenshots"));
    // What drives the browser, and axe, as the lock file has them.
    let install = format!(
        "mkdir -p {0} {1}; cd {0}
         cmp -s {2}/package-lock.json installed || {{
             cp {2}/package.json {2}/package-lock.json .
             npm ci --ignore-scripts --no-audit --no-fund --silent >&2
             cp package-lock.json installed
         }}",
        modules.display(),
        pictures.display(),
        root.join("tests/tools/browser").display()
    );
    sh(root, &install);
    // Nothing is asked of the registry for the page.
    let serve = Serve::start(&[&release().data()], &["--registry=http://127.0.0.1:9", "--memory=256M"]);
    let mut node = tool("node");
    node.arg(root.join("tests/tools/browser/page.mjs")).arg(modules).arg(serve.port()).arg(pictures);
    let said = String::from_utf8(ok(&mut node)).unwrap();
    assert!(said.ends_with("the page is good\n"), "{said}");
}
