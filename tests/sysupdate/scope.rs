//! Which repositories are offered, whose key signs, what guesses of names cost the registry, and bounds of what it says.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use rehydrator::openpgp::Keys;
use serde_json::json;

use crate::sysupdate::common::{MANIFEST, Serve, System, TAR, TITLE, key, push};
use crate::tools::registry::{PROGRAM, Registry, fails, temp};
use crate::tools::server::{Reply, Request, Server};

/// What `serve` says when it refuses to start.
fn refuses(args: &[&str]) -> String {
    let serve = ["timeout", "20", PROGRAM, "serve", "--listen=127.0.0.1:0", "--registry=http://127.0.0.1:9"];
    fails(&[&serve[..], args].concat())
}

#[test]
fn nothing_is_vouched_for_or_opened_that_nobody_named() {
    let tmp = temp();
    let (secret, ..) = key(tmp.path());
    let sign = format!("--sign-key={}", secret.display());
    let none = "--authfile=/dev/null";
    let error = refuses(&[none, &sign]);
    assert!(error.contains("--sign-key: ") && error.contains("--repository GLOB must say"), "{error}");
    let error = refuses(&[none, &sign, "--repository=os", &sign]);
    assert!(error.contains("more than one key for all repositories"), "{error}");
    let other = format!("--sign-key=boot/x={}", secret.display());
    let error = refuses(&[none, "--repository=os/*", &other]);
    assert!(error.contains("--sign-key boot/x=…: no --repository matches boot/x"), "{error}");
    for (glob, why) in [("OS/*", "'O' is in no name of a repository"), ("os/", "each part between slashes")] {
        let error = refuses(&[none, &format!("--repository={glob}")]);
        assert!(error.contains(why) && error.contains(glob), "{error}");
    }

    // Credentials of all kinds: on the command line, in a file for the registry or a part of it, a certificate.
    let credentials = "credentials for 127.0.0.1:9: clients need none, and would read all that they open: \
                       --repository GLOB must say which repositories";
    let error = refuses(&["--creds=user:secret"]);
    assert!(error.contains(credentials), "{error}");
    let file = tmp.path().join("auth.json");
    let authfile = format!("--authfile={}", file.display());
    for place in ["127.0.0.1:9", "127.0.0.1:9/a/part"] {
        fs::write(&file, json!({ "auths": { place: { "auth": "dXNlcjpzZWNyZXQ=" } } }).to_string()).unwrap();
        let error = refuses(&[&authfile]);
        assert!(error.contains(credentials), "{error}");
    }
    let certs = tmp.path().join("certs");
    fs::create_dir(&certs).unwrap();
    fs::write(certs.join("client.cert"), "").unwrap();
    let error = refuses(&[none, &format!("--cert-dir={}", certs.display())]);
    assert!(error.contains(credentials), "{error}");
    fs::write(&file, "nonsense").unwrap();
    let error = refuses(&[&authfile]);
    assert!(error.contains("line 1: not a file of credentials"), "{error}");
}

/// Credentials that a file gets after the start are not used where no repository is named.
#[test]
fn credentials_that_come_later_open_nothing() {
    let tmp = temp();
    let file = tmp.path().join("auth.json");
    fs::write(&file, "{}").unwrap();
    let server = Server::start(|request: &Request| match request.header("authorization") {
        Some(_) => Reply::new(200, r#"{"tags":[]}"#),
        None => Reply::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let start = |more: &[&str]| {
        let registry = format!("--registry=http://{}", server.address);
        let authfile = format!("--authfile={}", file.display());
        Serve::start(&[&[&*registry, &*authfile, "--ttl=0s"], more].concat())
    };
    let (open, named) = (start(&[]), start(&["--repository=os"]));
    assert_eq!(open.get("os/SHA256SUMS", &[]).0, 502);
    let auths = json!({ "auths": { &server.address: { "auth": "dXNlcjpzZWNyZXQ=" } } });
    fs::write(&file, auths.to_string()).unwrap();
    assert_eq!(open.get("os/SHA256SUMS", &[]).0, 502);
    assert_eq!(named.get("os/SHA256SUMS", &[]).0, 200);
}

#[test]
fn what_is_not_offered_looks_like_what_does_not_exist() {
    let tmp = temp();
    let registry = Registry::secure(tmp.path());
    let client = registry.client();
    for name in ["os/disk", "os/deep/disk", "secret/disk", "os"] {
        push(&client, &registry.reference(&format!("{name}:1")), &[(TAR, "disk.raw", name.as_bytes())]);
    }
    let address = format!("--registry=https://{}", registry.address);
    let [auth, certs] = &registry.flags("")[..] else { panic!() };
    let serve = Serve::start(&[&address, auth, certs, "--repository=os/*"]);
    assert_eq!(serve.names("os/disk"), ["disk-1.raw"]);
    assert_eq!(serve.get("os/disk/disk-1.raw", &[]), (200, b"os/disk".to_vec()));
    let missing = serve.get("os/none/SHA256SUMS", &[]);
    assert_eq!(missing, (404, b"not found\n".to_vec()));
    for path in [
        "secret/disk/SHA256SUMS",
        "secret/disk/disk-1.raw",
        "os/deep/disk/SHA256SUMS",
        "os/SHA256SUMS",
        "x/os/disk/SHA256SUMS",
        "os/../secret/disk/SHA256SUMS",
        "os/%2e%2e/secret/disk/SHA256SUMS",
        "os/disk%2f../../secret/disk/SHA256SUMS",
        "os//disk/SHA256SUMS",
        "os/disk:1/SHA256SUMS",
        "os/disk@sha256:00/SHA256SUMS",
    ] {
        let (exit, status, body) = serve.curl(path, &["-g"]);
        assert_eq!((exit, status, body), (0, 404, missing.1.clone()), "{path}");
    }
    // Several globs; ** is all.
    let serve = Serve::start(&[&address, auth, certs, "--repository=none", "--repository=**/disk"]);
    assert_eq!(serve.names("secret/disk"), ["disk-1.raw"]);
    assert_eq!(serve.names("os/deep/disk"), ["disk-1.raw"]);
    assert_eq!(serve.get("os/SHA256SUMS", &[]).0, 404);
}

/// A registry of one empty repository, `os/real`, that counts and notes how many requests it has at once.
fn slow(time: Duration) -> (Server, Arc<AtomicUsize>) {
    let (now, most) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let server = Server::start(move |request: &Request| {
        seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(time);
        now.fetch_sub(1, Ordering::SeqCst);
        match request.path.starts_with("/v2/os/real/") {
            true => Reply::new(200, r#"{"tags":[]}"#),
            false => Reply::new(404, ""),
        }
    });
    (server, most)
}

#[test]
fn guesses_cost_the_registry_little() {
    let (server, most) = slow(Duration::from_millis(50));
    let registry = format!("--registry=http://{}", server.address);
    let serve = Serve::start(&[&registry, "--authfile=/dev/null", "--repository=os/*"]);
    // Outside of the globs: no request at all, not even the first one that finds out about TLS.
    for path in ["secret/SHA256SUMS", "secret/x/SHA256SUMS", "os/SHA256SUMS", "os/a/b/SHA256SUMS"] {
        assert_eq!(serve.get(path, &[]), (404, b"not found\n".to_vec()));
    }
    assert_eq!(server.log().len(), 0);
    // The same guess by many at once, and then again and again: one request.
    let all = |names: &(dyn Fn(usize) -> String + Sync)| {
        std::thread::scope(|scope| {
            for n in 0..40 {
                let (serve, path) = (&serve, names(n));
                scope.spawn(move || assert_eq!(serve.get(&path, &[]).0, 404, "{path}"));
            }
        });
    };
    all(&|_| "os/guess/SHA256SUMS".into());
    all(&|n| format!("os/guess/guess-{n}.raw"));
    assert_eq!(server.lines(), ["GET /v2/os/guess/tags/list?n=1000"]);
    // Different guesses by one client: four at once.
    most.store(0, Ordering::SeqCst);
    all(&|n| format!("os/guess-{n}/SHA256SUMS"));
    assert_eq!(server.lines().len(), 41);
    assert_eq!(most.load(Ordering::SeqCst), 4);
    all(&|n| format!("os/guess-{n}/SHA256SUMS"));
    assert_eq!(server.lines().len(), 41);

    // Whoever asks for what exists does not wait behind them.
    let serve = Serve::start(&[&registry, "--authfile=/dev/null", "--repository=os/*", "--ttl=0s"]);
    assert_eq!(serve.text("os/real/SHA256SUMS"), "");
    std::thread::scope(|scope| {
        for n in 0..100 {
            let serve = &serve;
            scope.spawn(move || serve.get(&format!("os/other-{n}/SHA256SUMS"), &[]));
        }
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        assert_eq!(serve.text("os/real/SHA256SUMS"), "");
        assert!(start.elapsed() < Duration::from_millis(700), "{:?}", start.elapsed());
    });
}

#[test]
fn a_client_that_goes_away_leaves_no_more_lookups_than_one_that_waits() {
    let (server, most) = slow(Duration::from_millis(400));
    let registry = format!("--registry=http://{}", server.address);
    let serve = Serve::start(&[&registry, "--authfile=/dev/null"]);
    serve.get("first/SHA256SUMS", &[]);
    for n in 0..12 {
        let (exit, ..) = serve_in(&serve, &format!("guess-{n}/SHA256SUMS"), "0.1");
        assert_eq!(exit, 28, "curl has waited");
    }
    assert!(most.load(Ordering::SeqCst) <= 4, "{most:?}");
}

/// curl that waits only so long.
fn serve_in(serve: &Serve, path: &str, seconds: &str) -> (i32, u16, Vec<u8>) {
    serve.curl(path, &["--max-time", seconds])
}

#[test]
fn each_list_is_signed_by_the_key_of_its_repository() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let client = registry.client();
    let mut keys = Vec::new();
    for name in ["own", "team", "rest"] {
        let dir = tmp.path().join(name);
        fs::create_dir(&dir).unwrap();
        keys.push(key(&dir));
    }
    for name in ["os/disk", "team/disk", "team/a", "x/disk"] {
        let at = registry.reference(&format!("{name}:1"));
        push(
            &client,
            &at,
            &[(TAR, "root-1.raw", name.as_bytes()), (TAR, "uki.efi", b"uki of a size that is read")],
        );
    }
    let file = |n: usize| keys[n].0.display().to_string();
    let globs = [
        "--repository=**".into(),
        format!("--registry=http://{}", registry.address),
        "--authfile=/dev/null".into(),
        format!("--sign-key=team/*={}", file(1)),
        format!("--sign-key=os/disk={}", file(0)),
        format!("--sign-key=team/a={}", file(0)),
    ];
    let globs: Vec<_> = globs.iter().map(String::as_str).collect();
    let rest = format!("--sign-key={}", file(2));
    let serve = Serve::start(&[&globs[..], &[&rest]].concat());
    let signed_by = |serve: &Serve, repository: &str| {
        let sums = serve.text(&format!("{repository}/SHA256SUMS"));
        let (status, signature) = serve.get(&format!("{repository}/SHA256SUMS.gpg"), &[]);
        let good = |(_, gpg, fingerprint): &(_, crate::tools::Gpg, String)| {
            let mut keys = Keys::default();
            keys.add(&gpg.export(fingerprint)).unwrap();
            status == 200 && keys.verify(&signature, sums.as_bytes()).is_ok()
        };
        (0..3).filter(|n| good(&keys[*n])).collect::<Vec<_>>()
    };
    assert_eq!(signed_by(&serve, "os/disk"), [0]);
    // The first that matches.
    assert_eq!(signed_by(&serve, "team/disk"), [1]);
    assert_eq!(signed_by(&serve, "team/a"), [1]);
    assert_eq!(signed_by(&serve, "x/disk"), [2]);
    // A title stands alone as a name only where the key signs for no other repository.
    assert_eq!(serve.names("x/disk"), ["disk-1.root-1.raw", "disk-1.uki.efi"]);
    assert_eq!(serve.names("team/a"), ["a-1.root-1.raw", "a-1.uki.efi"]);
    // The key of os/disk is also that of team/a, if only by another glob.
    assert_eq!(serve.names("os/disk"), ["disk-1.root-1.raw", "disk-1.uki.efi"]);
    let own = Serve::start(&[&globs[..5], &[&rest]].concat());
    assert_eq!(own.names("os/disk"), ["disk-1.uki.efi", "root-1.raw"]);
    // Without the key for the rest, the rest is not signed.
    let serve = Serve::start(&globs);
    assert_eq!(signed_by(&serve, "os/disk"), [0]);
    assert_eq!(serve.names("x/disk"), ["disk-1.uki.efi", "root-1.raw"]);
    assert_eq!(serve.get("x/disk/SHA256SUMS.gpg", &[]).0, 404);

    // systemd-sysupdate takes the list of its own repository, and not that of another, whoever puts it in its place.
    let public = keys[0].1.run("", &["--export", &keys[0].2], b"");
    let system = System::new(&tmp.path().join("system"), &public);
    let pattern = ["url-file", "disk-@v.uki.efi"];
    system.transfer("good", &format!("{}/os/disk", own.url), pattern, ["regular-file", "disk-@v.efi"]);
    system.sysupdate("good", "update");
    assert_eq!(fs::read(system.path("srv/good/disk-1.efi")).unwrap(), b"uki of a size that is read");
    system.transfer("bad", &format!("{}/team/disk", own.url), pattern, ["regular-file", "disk-@v.efi"]);
    let (good, _, text) = system.try_sysupdate("bad", "update");
    assert!(!good && text.contains("Signature verification failed"), "{text}");
}

#[test]
fn repositories_that_one_key_confuses_are_named_in_the_log() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let (secret, ..) = key(tmp.path());
    for name in ["a/disk", "b/disk", "b/other"] {
        let at = registry.reference(&format!("{name}:1"));
        push(&registry.client(), &at, &[(TAR, "disk.raw", name.as_bytes())]);
    }
    let address = format!("--registry=http://{}", registry.address);
    let sign = format!("--sign-key={}", secret.display());
    let serve = Serve::start(&[&address, "--authfile=/dev/null", "--repository=*/*", &sign]);
    for name in ["b/other", "a/disk", "b/disk"] {
        serve.names(name);
    }
    let log = serve.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("one key signs for both")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("/b/disk and ") && lines[0].contains("/a/disk: "), "{log}");
}

/// The most memory that a server has had, in MiB.
fn peak(serve: &Serve) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", serve.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() >> 10
}

/// A registry in which every repository has this many tags, and each of them the manifest that `manifest` makes.
fn of_tags(count: usize, manifest: impl Fn(&str) -> String + Send + Sync + 'static) -> Server {
    let tags: Vec<_> = (0..count).map(|n| format!("t{n}")).collect();
    let tags = json!({ "tags": tags }).to_string();
    Server::start(move |request: &Request| match request.path.rsplit_once("/manifests/") {
        None => Reply::new(200, tags.clone()),
        Some((_, tag)) => {
            let bytes = manifest(tag).into_bytes();
            let digest = Digest::of(&bytes).oci();
            Reply::new(200, bytes).header("Content-Type", MANIFEST).header("Docker-Content-Digest", digest)
        }
    })
}

fn layers(tag: &str, count: usize, title: usize) -> String {
    let layer = |n: usize| {
        let digest = Digest::of(format!("{tag} {n}").as_bytes()).oci();
        json!({ "mediaType": TAR, "size": 1, "digest": digest,
            "annotations": { TITLE: format!("{n}-{}.raw", "x".repeat(title)) } })
    };
    json!({ "schemaVersion": 2, "layers": (0..count).map(layer).collect::<Vec<_>>() }).to_string()
}

#[test]
fn what_a_registry_says_has_bounds() {
    for (server, status, said, most) in [
        // Manifests as long as a registry takes them: nothing is made of them.
        (
            of_tags(60, |tag| {
                format!(
                    r#"{{"schemaVersion":2,"layers":[],"annotations":{{"{tag}":"{}"}}}}"#,
                    "x".repeat(4_190_000)
                )
            }),
            200,
            "left out: a document of ",
            200,
        ),
        // Layers without number.
        (
            of_tags(60, |tag| {
                let digest = Digest::of(tag.as_bytes()).oci();
                let layer = format!(r#"{{"mediaType":"a","size":1,"digest":"{digest}"}},"#);
                format!(r#"{{"schemaVersion":2,"layers":[{}{{}}]}}"#, layer.repeat(4_190_000 / layer.len()))
            }),
            200,
            "left out: a document of ",
            200,
        ),
        (of_tags(20_001, |_| String::new()), 502, "more than 20000 tags", 200),
        (of_tags(61, |tag| layers(tag, 1000, 1)), 502, "more than 60000 files", 200),
        (of_tags(15, |tag| layers(tag, 1000, 230)), 502, "a list of more than 4194304 bytes", 200),
        (of_tags(2, |tag| layers(tag, 1001, 1)), 200, "1001 layers: more than 1000", 200),
        (of_tags(150, |_| "nonsense".into()), 200, "50 more left out", 200),
    ] {
        let registry = format!("--registry=http://{}", server.address);
        let serve = Serve::start(&[&registry, "--authfile=/dev/null", "--memory=256M"]);
        assert_eq!(serve.get("os/SHA256SUMS", &[]).0, status, "{said}");
        let asked = server.lines().len();
        // What is of no use is not read again at once.
        assert_eq!(serve.get("os/SHA256SUMS", &[]).0, status, "{said}");
        assert_eq!(server.lines().len(), asked, "{said}");
        let peak = peak(&serve);
        println!("{said}: {peak} MiB");
        assert!(peak < most, "{said}: {peak} MiB");
        let log = serve.log();
        assert!(log.contains(said), "{said}: {log:.3000}");
        assert!(log.lines().count() < 150, "{said}: {} lines in the log", log.lines().count());
    }
}

/// Twenty repositories whose lists are as long as they may be, and all of them again after a change.
#[test]
fn lists_of_many_repositories_have_a_bound_together() {
    let round = Arc::new(AtomicUsize::new(0));
    let now = round.clone();
    let server = of_tags(40, move |tag| layers(&format!("{tag} {}", now.load(Ordering::SeqCst)), 1000, 10));
    let registry = format!("--registry=http://{}", server.address);
    let serve = Serve::start(&[&registry, "--authfile=/dev/null", "--memory=256M", "--ttl=0s"]);
    for n in 0..20 {
        assert_eq!(serve.get(&format!("os-{n}/SHA256SUMS"), &[]).0, 200);
    }
    let first = peak(&serve);
    for change in 1..=20 {
        round.store(change, Ordering::SeqCst);
        assert_eq!(serve.get("os-0/SHA256SUMS", &[]).0, 200);
    }
    let peak = peak(&serve);
    println!("20 repositories of 40,000 files: {first} MiB, after 20 changes of one {peak} MiB");
    assert!(peak < 400, "{first} and {peak} MiB");
}
