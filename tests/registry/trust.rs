//! Whom images are believed from: several who sign one, signatures that are demanded, and what was changed on the way.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use rehydrator::openpgp::{Keys, MAX_SIGNATURE};
use serde_json::Value;

use crate::registry::image::{Podman, Release, SigningKeys, flip, refs, skopeo, tagged};
use crate::tools::registry::{PROGRAM, Registry, fails, output, run};
use crate::tools::{Gpg, LATER, THEN};

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

// ---- messages of GnuPG ----------------------------------------------------------------------------------------------

/// Keys with one of gpg's in them.
fn keys(gpg: &Gpg, names: &[&str]) -> Keys {
    let mut keys = Keys::default();
    names.iter().for_each(|name| keys.add(&gpg.export(name)).unwrap());
    keys
}

/// A packet of OpenPGP: its tag, a length of five bytes, its content.
fn packet(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[0xc0 | tag, 0xff][..], &u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

/// A packet of data that are compressed by zlib.
fn compressed(content: &[u8]) -> Vec<u8> {
    let mut zlib = flate2::write::ZlibEncoder::new(vec![2], flate2::Compression::best());
    zlib.write_all(content).unwrap();
    packet(8, &zlib.finish().unwrap())
}

#[test]
fn messages_of_gpg() {
    let gpg = Gpg::new();
    for (name, algorithm) in
        [("rsa", "rsa3072"), ("ed", "ed25519"), ("p256", "nistp256"), ("p384", "nistp384")]
    {
        gpg.run("", &["--quick-generate-key", name, algorithm, "sign", "never"], b"");
        let keys = keys(&gpg, &[&format!("={name}")]);
        let sign = ["--local-user", name, "--sign"];
        for more in [
            &[][..],
            &["--compress-algo=zip"],
            &["--compress-algo=zlib"],
            &["--compress-level=0"],
            &["--armor"],
        ] {
            let message = gpg.run("", &[more, &sign].concat(), b"a document");
            assert_eq!(keys.open(&message).unwrap(), b"a document", "{name} {more:?}");
        }
    }
    let keys = keys(&gpg, &["=ed"]);
    let sign = |more: &[&str], content: &[u8]| {
        gpg.run("", &[more, &["--local-user", "ed", "--sign"]].concat(), content)
    };
    let bad = |message: &[u8], why: &str| {
        let started = Instant::now();
        let error = keys.open(message).unwrap_err().to_string();
        assert!(error.contains(why) && started.elapsed() < Duration::from_secs(2), "{error}: expected {why}");
    };
    let good = sign(&[], b"a document");
    let plain = sign(&["--compress-level=0"], b"a document");
    bad(&sign(&["--compress-algo=bzip2"], b"a document"), "compressed with BZip2: expected ZIP or ZLIB");
    bad(&gpg.run("", &["--local-user", "rsa", "--sign"], b"x"), "unknown key");
    // Every message that was cut, and every one with something behind it.
    for message in [&good, &plain, &compressed(&plain)] {
        for cut in 0..message.len() {
            bad(&message[..cut], "");
        }
        for more in [&b"\0"[..], b"x", &packet(11, b"b\0\0\0\0\0more"), &plain] {
            bad(&[message, more].concat(), "");
        }
    }
    for inside in [&b"x"[..], &packet(11, b"b\0\0\0\0\0more"), &plain] {
        bad(&compressed(&[&plain, inside].concat()), "");
    }
    // Each byte of it counts.
    for at in 0..plain.len() {
        let mut changed = plain.clone();
        changed[at] ^= 1;
        let opened = keys.open(&changed);
        // The name of the file and its date are not signed.
        assert!(opened.is_err() || opened.as_deref().unwrap() == b"a document", "byte {at}");
    }
    // Nothing signs it.
    bad(&packet(11, b"b\0\0\0\0\0a document"), "not a signature");
    bad(&compressed(&packet(11, b"b\0\0\0\0\0a document")), "not a signature");

    // As long as it may be, and a byte more; as it is, and compressed.
    let longest = |n: usize| -> Vec<u8> { sign(&["--compress-level=0"], &vec![b' '; n]) };
    // gpg cuts what it does not know the length of into parts.
    let fits = |n: &usize| longest(*n).len() <= MAX_SIGNATURE as usize;
    let most = (0..MAX_SIGNATURE as usize - 100).rev().find(fits).unwrap();
    assert_eq!(keys.open(&longest(most)).unwrap().len(), most);
    assert_eq!(keys.open(&compressed(&longest(most))).unwrap().len(), most);
    let limit = format!("more than {MAX_SIGNATURE} bytes");
    bad(&longest(most + 1), &limit);
    bad(&compressed(&longest(most + 1)), &limit);
    // Bombs: one layer of 1000 to 1, two of them, one that is signed, one in what is signed.
    let zeros = compressed(&packet(11, &vec![b' '; 60 << 20]));
    assert!(zeros.len() < MAX_SIGNATURE as usize, "{}", zeros.len());
    bad(&zeros, &limit);
    bad(&compressed(&zeros), "");
    bad(&compressed(&compressed(&plain)), "");
    bad(&sign(&["--compress-level=0"], &vec![0; 1 << 20])[..MAX_SIGNATURE as usize], "");
    bad(&[&plain[..15], &compressed(&packet(11, b"b\0\0\0\0\0a document")), &plain[15..]].concat(), "");
    bad(&compressed(&b"\xca\x03PGP".repeat(13_000)), "");
}

/// Signed by skopeo and podman, which let gpg compress.
#[test]
fn signed_by_skopeo_and_podman() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    let gpg = Gpg::new();
    let algorithms = [("ed", "ed25519"), ("rsa", "rsa2048"), ("p256", "nistp256")];
    let signers = algorithms.map(|(name, algorithm)| (name, gpg.key_of(algorithm, "", name, "never")));
    let (expired, revoked) = (gpg.key(THEN, "expired", "1y"), gpg.key(THEN, "revoked", "never"));
    for name in ["ed", "rsa", "p256", "expired", "revoked"] {
        fs::write(release.path(name), gpg.export(&format!("={name}"))).unwrap();
    }
    let tree = release.text("tree");
    let home = release.path("home");
    let lookaside = release.text("lookaside");
    let registries = home.join(".config/containers/registries.d");
    fs::create_dir_all(&registries).unwrap();
    let staging = format!(
        "docker:\n  {}:\n    lookaside-staging: file://{lookaside}\n    sigstore-staging: file://{lookaside}\n",
        registry.address
    );
    fs::write(registries.join("test.yaml"), staging).unwrap();
    release.build(&format!("docker://{}/x:0", registry.address), &["--tls-verify=false"]);
    let image = |tag: &str| format!("docker://{}/x:{tag}", registry.address);
    let skopeo = |key: &str, tag: &str| {
        let mut skopeo = Command::new("skopeo");
        skopeo.env("GNUPGHOME", gpg.home()).args(["--registries.d"]).arg(&registries);
        skopeo.args(["copy", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"]);
        skopeo.args(["--sign-by", key, &image("0"), &image(tag)]).output().unwrap()
    };
    let pull = |key: &str, tag: &str| {
        let (image, key) = (image(tag).replace("docker://", ""), release.text(key));
        let pull = [PROGRAM, "pull", &image, &tree, "--force", "--cache=no", "--tls-verify=false"];
        output(&[&pull[..], &["--key", &key, "--lookaside", &lookaside]].concat())
    };
    let good =
        |output: Output| assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bad = |output: Output, why: &str| {
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(why), "{error}: expected {why}");
    };
    for (name, key) in &signers {
        good(skopeo(key, name));
        good(pull(name, name));
    }
    bad(pull("expired", "p256"), "signed by an unknown key");
    // Another name of the same image: none of its signatures is of it.
    good(
        Command::new("skopeo")
            .args(["copy", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"])
            .args([&image("0"), &image("unsigned")])
            .output()
            .unwrap(),
    );
    bad(pull("p256", "unsigned"), "it is of ");
    let signature = || {
        let mut files: Vec<_> =
            fs::read_dir(Path::new(&lookaside)).unwrap().map(|e| e.unwrap().path()).collect();
        let dir = files.pop().unwrap();
        assert!(files.is_empty());
        (1..).map(|n| dir.join(format!("signature-{n}"))).take_while(|path| path.exists()).last().unwrap()
    };
    // Of podman, and changed.
    let podman = Podman::new(&home);
    podman.run(&["pull", "--quiet", "--tls-verify=false", &image("0")]);
    fs::remove_dir_all(&lookaside).unwrap();
    let name = image("0").replace("docker://", "");
    let push = ["push", "--tls-verify=false", "--sign-by", &signers[0].1, &name, &image("podman")];
    good(podman.command().env("GNUPGHOME", gpg.home()).args(push).output().unwrap());
    good(pull("ed", "podman"));
    flip(&signature());
    bad(pull("ed", "podman"), "bad signature");

    // Made when the key was good, and later; by one that was revoked.
    let digest = run(&["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}", &image("0")]);
    let payload = serde_json::json!({"critical": {"identity": {"docker-reference": image("0").replace("docker://", "")},
        "image": {"docker-manifest-digest": digest.trim()}, "type": "atomic container signature"}, "optional": {}});
    let place = Path::new(&lookaside).join(format!("x@{}", digest.trim().replace(':', "=")));
    let _ = fs::remove_dir_all(&lookaside);
    fs::create_dir_all(&place).unwrap();
    let signed = |time: &str, key: &str| {
        let message = gpg.run(time, &["--local-user", key, "--sign"], payload.to_string().as_bytes());
        fs::write(place.join("signature-1"), message).unwrap();
    };
    signed("20200601T000000", &expired);
    good(pull("expired", "0"));
    signed("20200601T000000", &revoked);
    good(pull("revoked", "0"));
    gpg.revoke(LATER, &revoked, 1);
    fs::write(release.path("revoked"), gpg.export("=revoked")).unwrap();
    bad(pull("revoked", "0"), "signed by a revoked key");
}

/// skopeo keeps a cosign signature in a `dir:` as a file of its own.
#[test]
fn cosign_signatures_in_a_directory() {
    let release = Release::new();
    SigningKeys::make(release.tmp.path());
    let (_, stranger) = key(&release, "stranger");
    let layout = format!("oci:{}:x", release.text("layout"));
    release.build(&layout, &[]);
    let (secret, public) = (release.text("cosign.private"), release.text("cosign.pub"));
    let copy = format!("dir:{}", release.text("copy"));
    let sign =
        ["copy", "--preserve-digests", "--sign-by-sigstore-private-key", &secret, "--sign-passphrase-file"];
    let identity = ["--sign-identity", "quay.io/x/y:z", &layout, &copy];
    let passphrase = release.text("passphrase");
    run(&[&refs(&skopeo())[..], &sign, &[&passphrase], &identity].concat());
    let signature = release.path("copy/signature-1");
    assert!(fs::read(&signature).unwrap().starts_with(b"\0sigstore-json\n"));
    let verify =
        |key: &str, name: &str| output(&[PROGRAM, "verify", &copy, "--cosign-key", key, "--identity", name]);
    let good = verify(&public, "quay.io/x/y:z");
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    let bad = |output: Output, why: &str| {
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(why), "{error}: expected {why}");
    };
    bad(verify(&stranger, "quay.io/x/y:z"), "signature 1: not made with this key");
    bad(verify(&public, "quay.io/x/y:other"), "it is of \"quay.io/x/y:z\", not of quay.io/x/y:other");
    // It is no signature of OpenPGP, and none at all when it was changed.
    let e = fails(&[
        PROGRAM,
        "verify",
        &copy,
        "--key",
        &release.text("public.asc"),
        "--lookaside",
        "/nonexistent",
    ]);
    assert!(e.contains("no signature beside it"), "{e}");
    let text = fs::read_to_string(&signature).unwrap();
    for (from, to, why) in [
        (
            "cosign.simplesigning",
            "cosign.another",
            "expected \"application/vnd.dev.cosign.simplesigning.v1+json\"",
        ),
        (
            "cosignproject.cosign/signature",
            "cosignproject.cosign/another",
            "no dev.cosignproject.cosign/signature",
        ),
        ("{", "[", "not a cosign signature"),
        ("\0sigstore-json\n", "\0another\n", "no signature: there is no sha256-"),
    ] {
        fs::write(&signature, text.replace(from, to)).unwrap();
        bad(verify(&public, "quay.io/x/y:z"), why);
    }
}
