//! `--dehydrate`: what is mirrored becomes an image in a real registry, and comes out of it again.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::mirror::site::{Site, Summary, rehydrator, text};
use crate::tools::Nginx;
use crate::tools::registry::{Registry, run};
use crate::tools::small::{sh, small_stream};

/// A stream of four artifacts, and a registry.
struct Supply {
    site: Site,
    registry: Registry,
    nginx: Nginx,
}

impl Supply {
    fn new() -> Self {
        let site = Site::new();
        let www = site.www("");
        small_stream(&www);
        // Signed anew by the key of the site.
        for name in ["a.raw.xz", "b.raw.gz", "c.raw.zip", "d.raw.xz"] {
            site.put_signed(
                &format!("artifacts/{name}"),
                &fs::read(www.join("artifacts").join(name)).unwrap(),
            );
        }
        let nginx = Nginx::serve(&www);
        let registry = Registry::plain(site.dir.path());
        Self { site, registry, nginx }
    }

    /// Publishes the stream, which calls itself so, as of this version.
    fn publish(&self, stream: &str, version: &str) {
        let text = fs::read_to_string(self.site.www("stream.json")).unwrap();
        let text = text.replace("https://example.invalid/", &format!("{}/artifacts/", self.nginx.url));
        let mut document: Value = serde_json::from_str(&text).unwrap();
        document["stream"] = json!(stream);
        for (_, platform) in document["architectures"]["x86_64"]["artifacts"].as_object_mut().unwrap() {
            platform["release"] = json!(version);
        }
        self.site.put(&format!("streams/{stream}.json"), document.to_string().as_bytes());
    }

    fn configure(&self, more: &Value) {
        let mut source = json!({"type": "stream", "streams": ["test"], "keys": ["keys"],
            "url": format!("{}/streams/{{stream}}.json", self.nginx.url)});
        source.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.site.config(&json!({"sources": [source]}));
    }

    fn mirror(&self, more: &[&str]) -> Summary {
        let repository = format!("{}/coreos/disks", self.registry.address);
        // Of the program the tests have a large build, which zstd takes half a minute for.
        let own = [
            "--dehydrate",
            &repository,
            "--program-compression=gzip",
            "--tls-verify=false",
            "--authfile=/dev/null",
        ];
        self.site.mirror(&[&own, more].concat())
    }

    /// An image by its tag.
    fn image(&self, tag: &str) -> String {
        format!("docker://{}/coreos/disks:{tag}", self.registry.address)
    }

    fn digest(&self, tag: &str) -> String {
        let inspect = ["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}"];
        run(&[&inspect[..], &[&self.image(tag)]].concat()).trim().into()
    }

    /// The files that come out of an image: those that are served from `served`.
    fn files(&self, tag: &str, served: &str, more: &[&str]) -> BTreeSet<String> {
        let out = tempfile::tempdir_in(self.site.dir.path()).unwrap();
        let mut command = rehydrator();
        command.arg("rehydrate").arg(out.path()).args(["--from", &self.image(tag)]);
        command.args(["--tls-verify=false", "--authfile=/dev/null"]).args(more);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let names = fs::read_dir(out.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let names: BTreeSet<String> = names.collect();
        for name in &names {
            let served = fs::read(self.site.www(served).join(name)).unwrap();
            assert!(fs::read(out.path().join(name)).unwrap() == served, "{name}");
        }
        names
    }
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[test]
fn a_mirror_becomes_an_image() {
    let supply = Supply::new();
    let dir = supply.site.dir.path();
    let at = |name: &str| dir.join(name).display().to_string();
    supply.publish("test", "1.0");
    supply.configure(&json!({}));
    sh(
        dir,
        "openssl ecparam -genkey -name prime256v1 -noout -out cosign.key 2>/dev/null
         openssl ec -in cosign.key -pubout -out cosign.pub 2>/dev/null",
    );
    fs::write(at("secret.asc"), supply.site.gpg.run("", &["--armor", "--export-secret-keys"], b"")).unwrap();
    let signing = ["--sign-key", &at("secret.asc"), "--cosign-key", &at("cosign.key")];
    let summary = supply.mirror(&signing).good();
    assert_eq!(summary.counts(), (4, 0));
    let digest = supply.digest("1.0");
    let image = format!("{}/coreos/disks:1.0", supply.registry.address);
    let expected = |new: bool| json!([{"image": image, "stream": "test", "digest": digest, "new": new}]);
    assert_eq!(summary.0["images"], expected(true));
    assert_eq!(supply.digest("test"), digest);
    assert_eq!(fs::read_dir(supply.site.dest(".rehydrator/work")).unwrap().count(), 0);

    // Each tag is signed, in both ways, and gives back every file.
    let (pem, lookaside) = (at("cosign.pub"), supply.site.dest("sigstore").display().to_string());
    let signed = ["--key", &at("keys"), "--cosign-key", &pem, "--lookaside", &lookaside];
    for tag in ["1.0", "test"] {
        let files = supply.files(tag, "", &[&["--all"], &signed[..]].concat());
        assert_eq!(files, set(["a.raw", "b.raw", "c.raw", "d.raw"]));
    }
    let published = supply.files("test", "artifacts", &["--published", "--disk", "a", "--disk", "b"]);
    assert_eq!(published, set(["a.raw.xz", "a.raw.xz.sig", "b.raw.gz", "b.raw.gz.sig"]));
    // The document is that which was published.
    let print = [env!("CARGO_BIN_EXE_rehydrator"), "print-stream-json", "--tls-verify=false", "--from"];
    let printed = run(&[&print[..], &[&supply.image("test")]].concat());
    assert_eq!(printed.as_bytes(), fs::read(supply.site.www("streams/test.json")).unwrap());

    // What is there is not built again; a tag that was lost is set again.
    let copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"];
    let another = supply.image(&format!("{}.sig", digest.replace(':', "-")));
    run(&[&copy[..], &[&another, &supply.image("test")]].concat());
    assert_ne!(supply.digest("test"), digest);
    let summary = supply.mirror(&signing).good();
    assert_eq!((summary.counts(), &summary.0["images"]), ((0, 4), &expected(false)));
    assert_eq!(supply.digest("test"), digest);

    // Without some of the artifacts it is another image.
    supply.configure(&json!({"filters": ["- *.zip"]}));
    let summary = supply.mirror(&[]).good();
    assert_eq!(summary.0["images"][0]["new"], true);
    assert_ne!(supply.digest("1.0"), digest);
    assert_eq!(supply.digest("test"), supply.digest("1.0"));
    assert_eq!(supply.files("test", "", &["--all"]), set(["a.raw", "b.raw", "d.raw"]));

    // What has the tag, and is no such image, stays.
    run(&[&copy[..], &[&another, &supply.image("1.0")]].concat());
    let failed = supply.mirror(&[]).failed();
    assert!(failed.len() == 1 && failed[0].contains("not an image of this program"), "{failed:?}");
}

/// What is wrong with an image is in the summary, and the mirror is whole all the same.
#[test]
fn an_image_that_fails() {
    let supply = Supply::new();
    supply.publish("test", "1.0");
    supply.configure(&json!({"formats": ["raw.gz"]}));
    supply.mirror(&["--profile", "fast"]).good();
    // The same version of another stream.
    supply.publish("another", "1.0");
    supply.configure(&json!({"formats": ["raw.gz"], "streams": ["another"]}));
    let image = format!("{}/coreos/disks:1.0", supply.registry.address);
    let summary = supply.mirror(&[]);
    assert_eq!(
        summary.failed(),
        [format!("image of another: {image}: it is of stream test, not of another")]
    );
    assert_eq!(summary.0["channels"][0]["complete"], true);
    assert_eq!(summary.0["images"], Value::Null);
    supply.publish("test", "2.0");
    supply.configure(&json!({"formats": ["raw.gz"]}));
    let unwritable = supply.site.dir.path().join("file");
    fs::write(&unwritable, "").unwrap();
    let summary = supply.mirror(&["--workdir", unwritable.to_str().unwrap()]);
    let failed = summary.failed();
    assert!(failed.len() == 1 && failed[0].starts_with("image of test: "), "{failed:?}");
    assert_eq!(fs::read_link(supply.site.dest("test/current")).unwrap(), Path::new("../all/2.0"));
    // Then it is built.
    let work = supply.site.dir.path().join("work");
    let summary = supply.mirror(&["--workdir", work.to_str().unwrap()]).good();
    assert_eq!((&summary.0["images"][0]["new"], summary.counts()), (&json!(true), (0, 1)));
    assert_eq!(supply.digest("test"), supply.digest("2.0"));
    assert_eq!(fs::read_dir(work).unwrap().count(), 0);

    // A file that fails is a failure of the mirror, and no image is made of the rest.
    supply.publish("test", "3.0");
    fs::write(supply.site.www("artifacts/b.raw.gz"), "something else").unwrap();
    let summary = supply.mirror(&[]);
    assert!(summary.failed().len() == 1 && summary.0["images"] == Value::Null, "{:?}", summary.failed());
}

#[test]
fn only_of_streams() {
    let supply = Supply::new();
    let says = |config: &Value, repository: &str| {
        supply.site.config(config);
        let output = supply.site.command().args(["--dehydrate", repository]).output().unwrap();
        assert!(!output.status.success());
        text(&output.stderr)
    };
    let stream =
        json!({"type": "stream", "streams": ["test"], "keys": ["keys"], "url": "http://127.0.0.1:1/x"});
    let mut named = stream.clone();
    named["name"] = json!("again");
    let flatcar = json!({"type": "container-linux", "keys": ["keys"]});
    let error = says(&json!({"sources": [flatcar]}), "h.example/x");
    assert!(error.contains("--dehydrate: no source is of type stream"), "{error}");
    let error = says(&json!({"sources": [stream, named]}), "h.example/x");
    assert!(error.contains("--dehydrate: two sources have a stream test, and it is one tag"), "{error}");
    let error = says(&json!({"sources": [stream]}), "h.example/x:latest");
    assert!(error.contains("expected a repository: tags are those of the versions"), "{error}");
}
