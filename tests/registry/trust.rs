//! Whom images are believed from: several who sign one, signatures that are demanded, and what was changed on the way.

use std::fs;
use std::path::Path;

use rehydrator::digest::Digest;
use serde_json::Value;

use crate::registry::image::{Release, flip, refs, tagged};
use crate::tools::registry::{PROGRAM, Registry, fails, run};

/// A key of openssl's: the files of the secret and of the public one.
fn key(release: &Release, name: &str) -> (String, String) {
    let (secret, public) = (release.text(name), release.text(&format!("{name}.pub")));
    run(&["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &secret]);
    run(&["openssl", "ec", "-in", &secret, "-pubout", "-out", &public]);
    (secret, public)
}

/// A key of gpg's: the files of the secret and of the public one.
pub fn openpgp(release: &Release) -> (String, String) {
    let gpg = crate::tools::Gpg::new();
    let fingerprint = gpg.key("", "signer", "never");
    let (secret, public) = (release.text("secret.asc"), release.text("public.asc"));
    fs::write(&public, gpg.export(&fingerprint)).unwrap();
    fs::write(&secret, gpg.run("", &["--armor", "--export-secret-keys", &fingerprint], b"")).unwrap();
    (secret, public)
}

fn raw(image: &str) -> Value {
    serde_json::from_str(&run(&["skopeo", "inspect", "--raw", "--tls-verify=false", image])).unwrap()
}

#[test]
fn several_sign() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    let keys = ["a", "b"].map(|name| key(&release, name));
    let there = format!("docker://{}/x:1", registry.address);
    let layout = format!("oci:{}:quay.io/x/y:z", release.text("layout"));
    for place in [&there, &layout] {
        for (secret, _) in &keys {
            release.build(place, &["--cosign-key", secret, "--tls-verify=false"]);
        }
        for (_, public) in &keys {
            run(&[PROGRAM, "verify", place, "--cosign-key", public, "--tls-verify=false"]);
        }
    }
}

#[test]
fn signatures_beside_a_layout() {
    let release = Release::new();
    let (secret, public) = openpgp(&release);
    let layout = release.text("layout");
    let image = format!("oci:{layout}:quay.io/x/y:z");
    let digest = release.build(&image, &["--sign-key", &secret]);
    let nowhere = release.text("nowhere");
    let verify = |place: &str| -> Vec<String> {
        let words = [PROGRAM, "verify", place, "--key", &public, "--lookaside", &nowhere];
        words.map(str::to_owned).to_vec()
    };
    run(&refs(&verify(&image)));
    let named = ["--identity", "quay.io/x/y:other"];
    let e = fails(&[&refs(&verify(&image))[..], &named].concat());
    assert!(e.contains("it is of \"quay.io/x/y:z\", not of quay.io/x/y:other"), "{e}");

    // As skopeo brings it along into a directory.
    let copy = format!("dir:{}", release.text("copy"));
    run(&["skopeo", "copy", "--preserve-digests", &image, &copy]);
    let e = fails(&refs(&verify(&copy)));
    assert!(e.contains("no signature beside it"), "{e}");
    let signature = Path::new(&layout).join(format!("{}.signature-1", &digest[7..]));
    fs::copy(&signature, release.path("copy/signature-1")).unwrap();
    run(&refs(&verify(&copy)));

    // One that was changed, and an image that was.
    flip(&signature);
    fails(&refs(&verify(&image)));
    let manifest = release.path("copy/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replacen("stable", "stablE", 1)).unwrap();
    let e = fails(&refs(&verify(&copy)));
    assert!(e.contains(&format!("it is of \"{digest}\", not of ")), "{e}");
}

#[test]
fn pulled_and_mirrored_only_when_signed() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    let ((cosign, public), (_, stranger)) = (key(&release, "a"), key(&release, "b"));
    let (openpgp, certificate) = openpgp(&release);
    let name = |repository: &str| format!("{}/{repository}:1", registry.address);
    let signed = ["--cosign-key", &cosign, "--sign-key", &openpgp, "--tls-verify=false"];
    release.build(&format!("docker://{}", name("signed")), &signed);
    release.build(&format!("docker://{}", name("unsigned")), &["--tls-verify=false"]);
    let (tree, copy) = (release.text("tree"), name("copy"));
    let lookaside = release.text("sigstore");
    let good = ["--cosign-key", &public, "--key", &certificate, "--lookaside", &lookaside];
    let pull = [PROGRAM, "pull", "--tls-verify=false", "--cache=no"];
    let mirror = [PROGRAM, "mirror", "image", "--tls-verify=false"];
    for (command, dest) in [(&pull[..], &tree), (&mirror[..], &copy)] {
        let try_from = |repository: &str, key: &[&str]| {
            let image = name(repository);
            fails(&[command, &[&image, dest], key].concat())
        };
        let e = try_from("signed", &["--cosign-key", &stranger]);
        assert!(e.contains("not made with this key"), "{e}");
        let e = try_from("unsigned", &["--cosign-key", &public]);
        assert!(e.contains("no signature: there is no sha256-"), "{e}");
        let e = try_from("unsigned", &["--key", &certificate, "--lookaside", &lookaside]);
        assert!(e.contains("no signature in "), "{e}");
    }
    assert!(!Path::new(&tree).exists());
    fails(&["skopeo", "inspect", "--tls-verify=false", &format!("docker://{copy}")]);
    run(&[&mirror[..], &[&name("signed"), &copy], &good].concat());
    run(&[&pull[..], &[&name("signed"), &tree], &good].concat());
    assert!(Path::new(&tree).join("srv/dehydrated/index.json").is_file());
    // The signature came along, and is of the name that it was signed under.
    let verify = [PROGRAM, "verify", "--tls-verify=false", "--cosign-key", &public];
    let there = format!("docker://{copy}");
    fails(&[&verify[..], &[&there]].concat());
    run(&[&verify[..], &[&there, "--identity", &name("signed")]].concat());
}

#[test]
fn changed_in_a_registry() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    let (cosign, public) = key(&release, "a");
    let there = format!("docker://{}/x:1", registry.address);
    let digest = release.build(&there, &["--cosign-key", &cosign, "--tls-verify=false"]);
    let signatures = raw(&tagged(&there, &format!("sha256-{}.sig", &digest[7..])));
    let manifest = raw(&there);
    let layers = manifest["layers"].as_array().unwrap();
    let rootfs = Digest::of(&release.rootfs).to_string();
    let with_rootfs = layers.iter().find(|layer| layer.to_string().contains(&rootfs)).unwrap();
    let name = |value: &Value| value["digest"].as_str().unwrap().to_owned();
    let out = release.text("out");
    let flags = ["--tls-verify=false", "--cosign-key", &public];
    let from = ["--from", there.as_str()];
    let rehydrate = [&[PROGRAM, "rehydrate", &out, "--pxe"][..], &flags, &from].concat();
    let verify = [&[PROGRAM, "verify", &there][..], &flags].concat();
    let list = [&[PROGRAM, "list"][..], &flags, &from].concat();
    run(&verify);
    let cases = [
        (name(with_rootfs), &rehydrate, format!("sha256 mismatch: expected {rootfs}, got ")),
        (name(with_rootfs), &verify, "sha256 mismatch: expected ".into()),
        // The layer of the metadata.
        (name(&layers[1]), &list, format!("sha256 mismatch: expected {}, got ", &name(&layers[1])[7..])),
        (digest.clone(), &list, format!("manifest: sha256 mismatch: expected {}, got ", &digest[7..])),
        // What was signed.
        (name(&signatures["layers"][0]), &list, "sha256 mismatch: expected ".into()),
    ];
    for (blob, command, expected) in cases {
        let path = registry.blob(&blob);
        flip(&path);
        let e = fails(command);
        assert!(e.contains(&expected), "{e}");
        flip(&path);
    }
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    run(&rehydrate);
}
