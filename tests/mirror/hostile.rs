//! What must not become visible: bad signatures, bad bodies, bad names.

use std::fs;
use std::path::Path;

use rehydrator::http::{Http, Retry};
use rehydrator::mirror::config::{Config, Defaults};
use rehydrator::mirror::{self, Options};
use rehydrator::progress::{Mode, Progress};
use serde_json::{Value, json};

use crate::mirror::site::{Site, fails, names, ok, rehydrator, text};
use crate::tools::{LATER, Nginx, Server, THEN, answer, noise, whole};

const DIR: &str = "stable/amd64-usr/1.0.0";

fn source(url: &str) -> Value {
    json!({"sources": [
        {"type": "container-linux", "url": format!("{url}/{{channel}}/{{arch}}-usr/"), "keys": ["keys"]}
    ]})
}

#[test]
fn only_good_signatures_are_visible() {
    let site = Site::new();
    site.release("stable", "1.0.0", &[("good", b"good")]);
    let sign = |name: &str, time: &str, key: &str, of: &[u8]| {
        site.put(&format!("{DIR}/{name}"), name.as_bytes());
        site.put(&format!("{DIR}/{name}.sig"), &site.gpg.sign(time, key, of));
    };
    let stranger = site.gpg.key("", "stranger", "never");
    let expired = site.gpg.key(THEN, "expired", "1y");
    let revoked = site.gpg.key(THEN, "revoked", "never");
    // The key stays, what signs with it changes: first one subkey, then another, the first one retired.
    let rotated = site.gpg.key(THEN, "rotated", "never");
    site.gpg.run(THEN, &["--quick-add-key", &rotated, "ed25519", "sign", "1y"], b"");
    sign("expired-then", "20200601T000000", &expired, b"expired-then");
    sign("revoked", "20200601T000000", &revoked, b"revoked");
    sign("first-subkey", "20200601T000000", &rotated, b"first-subkey");
    site.gpg.run(LATER, &["--quick-add-key", &rotated, "ed25519", "sign", "never"], b"");
    sign("second-subkey", "20230601T000000", &rotated, b"second-subkey");
    site.gpg.revoke(LATER, &revoked, 1);
    sign("stranger", "", &stranger, b"stranger");
    sign("bad", "", "=signer", b"something else");
    sign("truncated", "", "=signer", b"truncated, and more of it");
    sign("garbage", "", "=signer", b"garbage");
    site.put(&format!("{DIR}/garbage.sig"), b"<html>not found</html>");
    site.put(&format!("{DIR}/missing"), b"missing");
    site.put(&format!("{DIR}/gone.sig"), &site.gpg.sign("", "=signer", b"gone"));
    for key in ["expired", "revoked", "rotated"] {
        fs::write(site.dir.path().join("keys").join(key), site.gpg.export(&format!("={key}"))).unwrap();
    }
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.config(&source(&nginx.url));
    let expect = |new: u64, kept: u64| {
        let summary = site.mirror(&[]);
        let failed = summary.failed();
        let url = format!("{}/{DIR}", nginx.url);
        let expected = [
            "bad: bad signature: ",
            "garbage: bad signature: not a signature: ",
            &format!("gone: GET {url}/gone: 404 Not Found"),
            &format!("revoked: signed by a revoked key: {revoked}"),
            &format!("stranger: signed by an unknown key: {stranger}"),
            "truncated: bad signature: ",
        ];
        assert_eq!(failed.len(), expected.len(), "{failed:#?}");
        for (failed, expected) in failed.iter().zip(expected) {
            assert!(failed.starts_with(&format!("all/1.0.0/{expected}")), "{failed}\n{expected}");
        }
        assert_eq!(summary.skipped(), [format!("{url}/missing: there is no signature")]);
        assert_eq!(summary.counts(), (new, kept));
        let good = ["expired-then", "first-subkey", "good", "second-subkey", "version.txt"];
        let mut tree: Vec<_> =
            good.iter().flat_map(|n| ["", ".sig"].map(|s| format!("all/1.0.0/{n}{s}"))).collect();
        tree.extend(["all/".into(), "all/1.0.0/".into()]);
        tree.sort();
        assert_eq!(names(&site.tree()), tree);
    };
    expect(5, 0);
    // Nor the second time.
    expect(0, 5);
}

/// An index can be written by anyone between here and the server.
#[test]
fn hostile_links() {
    let site = Site::new();
    site.release("stable", "1.0.0", &[("good", b"good"), ("two words+1", b"plain enough")]);
    let outside = Site::new();
    outside.put_signed("elsewhere", b"elsewhere");
    for path in ["x", "etc/x", ".hidden", "a/x", "passwd", "%2e%2e", "current", "stable/amd64-usr/x"] {
        site.put_signed(path, b"signed all right");
        site.put_signed(&format!("{DIR}/{path}"), b"signed all right");
    }
    let other = Nginx::serve(&outside.www(""));
    let nginx = Nginx::serve(&site.www(""));
    let hostile = [
        ("../x.sig", "is in another directory"),
        ("../../../x.sig", "is in another directory"),
        ("a/x.sig", "is in another directory"),
        ("..\\x.sig", "is in another directory"),
        ("/x.sig", "is in another directory"),
        ("//127.0.0.1/x.sig", "leads to another server"),
        (&format!("{}/elsewhere.sig", other.url), "leads to another server"),
        ("file:///etc/passwd.sig", "leads to another server"),
        ("javascript:x.sig", "leads to another server"),
        (".hidden.sig", "is hidden"),
        ("%2ehidden.sig", "is hidden"),
        ("x.sig?y", "has a query or a fragment"),
        ("x.sig#y", "has a query or a fragment"),
        ("..%2fx.sig", "is hidden"),
        ("a%2fx.sig", "is no name of a file"),
        ("a%2Fx.sig", "is no name of a file"),
        ("a%5cx.sig", "is no name of a file"),
        ("x%00.sig", "is no name of a file"),
        ("x%0a.sig", "is no name of a file"),
        ("%252e%252e%252fx.sig", "is no name of a file"),
        ("x%3fy.sig", "is no name of a file"),
        ("%ff.sig", "is not UTF-8"),
        (&format!("{}.sig", "x".repeat(300)), "is no name of a file"),
    ];
    let mut html =
        "<html><a href='../'>up</a><a href=\"?C=M;O=A\">sort</a><a href='/stable/amd64-usr/'>".to_owned();
    for (link, _) in &hostile {
        html += &format!("<a class=x HREF=\"{link}\">x</a>\n");
    }
    html +=
        "<!-- <a href='x.sig'> --><script>'<a href=\"x.sig\">'</script><img href='x.sig'><a name='x.sig'>\n";
    html += "<a href=sub/>a directory</a><base href='http://127.0.0.1/'><a href=good>good</a><a\nhref = 'good.sig' >\n";
    html += "<a href='two%20words&#43;1.sig'><a href='version.txt.sig'><a href='good.sig'>twice</a><a href='unfinished";
    site.put(&format!("{DIR}/index.html"), html.as_bytes());
    site.config(&source(&nginx.url));
    let summary = site.mirror(&[]).good();
    assert_eq!(summary.counts(), (3, 0));
    let files = ["good", "good.sig", "two words+1", "two words+1.sig", "version.txt", "version.txt.sig"];
    let mut expected: Vec<_> = files.map(|f| format!("all/1.0.0/{f}")).into();
    expected.extend(["all/", "all/1.0.0/", "stable/"].map(String::from));
    expected.extend(["stable/1.0.0 -> ../all/1.0.0".into(), "stable/current -> ../all/1.0.0".into()]);
    let mut found = names(&site.tree());
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    // Each is named, and nothing of it was asked for.
    let url = format!("{}/{DIR}/", nginx.url);
    let named: Vec<_> =
        hostile.map(|(link, why)| format!("{url}: {}: the link {why}", &link[..link.len().min(200)])).into();
    let skipped = summary.skipped();
    for line in &named {
        assert!(skipped.contains(line), "{line}\n{skipped:#?}");
    }
    assert_eq!(skipped.len(), named.len() + 1, "and the directory: {skipped:#?}");
    let log = nginx.log();
    assert!(
        log.iter().all(|l| !l.contains("x.sig") && !l.contains("hidden") && !l.contains("passwd")),
        "{log:#?}"
    );
    assert_eq!(other.log(), [""; 0]);
}

#[test]
fn hostile_versions() {
    let site = Site::new();
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.release("beta", "2.0.0", &[("good", b"good")]);
    let mut config = source(&nginx.url);
    config["sources"][0]["channels"] = json!(["stable", "beta", "none"]);
    site.config(&config);
    for (version, error) in [
        ("../x", "not the name of a version: \"../x\""),
        ("..", "not the name of a version: \"..\""),
        (".x", "not the name of a version: \".x\""),
        ("a/b", "not the name of a version: \"a/b\""),
        ("current", "not the name of a version: \"current\""),
        ("", "not the name of a version: \"\""),
        ("1.0 && x", "not the name of a version: \"1.0 && x\""),
    ] {
        site.put_signed(
            "stable/amd64-usr/current/version.txt",
            format!("COREOS_VERSION_ID={version}\n").as_bytes(),
        );
        let failed = site.mirror(&[]).failed();
        assert_eq!(failed.len(), 2, "{failed:?}");
        assert!(failed[0].starts_with("none amd64: GET ") && failed[1].ends_with(error), "{failed:?}");
        assert!(failed[1].starts_with(&format!("stable amd64: {}/stable", nginx.url)), "{failed:?}");
    }
    // The others are mirrored all the same.
    assert!(site.dest("beta/current/good").exists());
    site.put_signed("stable/amd64-usr/current/version.txt", b"NAME=x\n");
    assert!(site.mirror(&[]).failed()[1].ends_with("version.txt: it names no version"));
    site.put("stable/amd64-usr/current/version.txt", b"COREOS_VERSION_ID=1.0.0\n");
    assert!(site.mirror(&[]).failed()[1].contains("version.txt: bad signature"));
}

/// Bodies that end early, and bodies that are others the next time.
#[test]
fn bodies_that_change() {
    let site = Site::new();
    let big = noise(1, 600_000);
    let other = noise(2, 600_000);
    site.release("stable", "1.0.0", &[("changes", &big), ("ends", &big), ("stays", &big)]);
    let mut files = std::collections::HashMap::new();
    for name in ["changes", "ends", "stays", "version.txt"] {
        for suffix in ["", ".sig"] {
            files.insert(
                format!("{DIR}/{name}{suffix}"),
                fs::read(site.www(&format!("{DIR}/{name}{suffix}"))).unwrap(),
            );
        }
    }
    files.insert("stable/amd64-usr/current/version.txt".into(), b"FLATCAR_VERSION_ID=1.0.0\n".into());
    let index = "<a href=changes.sig><a href=ends.sig><a href=stays.sig><a href=version.txt.sig>";
    files.insert(format!("{DIR}/"), index.into());
    let run = |server: &Server| {
        let config = serde_json::to_vec(&source(&server.url)).unwrap();
        let config = Config::parse(&config, site.dir.path(), &Defaults::default()).unwrap();
        let http = Http::new(Retry { attempts: 2, delay: std::time::Duration::from_millis(1) }).unwrap();
        mirror::run(&config, &site.dest(""), &Options::default(), &http, &Progress::new(Mode::None)).unwrap()
    };
    let bad = files.clone();
    // Cut in the middle, every time; and half of something else.
    let server = Server::new(move |request, _| {
        let good = whole(&bad, request);
        let name = request.name.as_str();
        match name.rsplit('/').next().unwrap() {
            "ends" if request.method == "GET" => good[..300_000.min(good.len() - 1)].to_vec(),
            "changes" if request.method == "GET" && request.from.is_none() => {
                answer("200 OK", "", &other)[..400_000].to_vec()
            }
            "changes" if request.method == "GET" => answer("500 Internal Server Error", "", b""),
            _ => good,
        }
    });
    let summary = run(&server);
    assert_eq!((summary.new, summary.failed.len()), (2, 2), "{:?}", summary.failed);
    assert!(
        summary.failed.iter().all(|f| f.error.contains("gave up after 2 attempts")),
        "{:?}",
        summary.failed
    );
    let visible = |name: &str| site.dest("all/1.0.0").join(name).exists();
    assert_eq!(
        ["stays", "ends", "ends.sig", "changes", "changes.sig"].map(visible),
        [true, false, false, false, false]
    );
    assert!(!site.dest("stable").exists());

    // What was begun is gone on with where it fits, and started over where it does not.
    let server = Server::new(move |request, _| whole(&files, request));
    let summary = run(&server);
    assert_eq!((summary.new, summary.kept, summary.failed.len()), (2, 2, 0), "{:?}", summary.failed);
    let gets = server.gets(&format!("{DIR}/ends"));
    assert!(gets.len() == 1 && gets[0].is_some(), "{gets:?}");
    let gets = server.gets(&format!("{DIR}/changes"));
    assert!(gets.len() == 2 && gets[0].is_some() && gets[1].is_none(), "{gets:?}");
    for name in ["changes", "ends", "stays"] {
        assert!(fs::read(site.dest("stable/current").join(name)).unwrap() == big, "{name}");
    }
    assert!(!site.dest(".rehydrator/partial").exists());
}

#[test]
fn no_room() {
    let site = Site::new();
    site.release("stable", "1.0.0", &[("image", b"image")]);
    let mut files = std::collections::HashMap::new();
    let names = ["current/version.txt", "1.0.0/version.txt", "1.0.0/version.txt.sig"];
    for name in names.map(|name| format!("stable/amd64-usr/{name}")) {
        files.insert(name.clone(), fs::read(site.www(&name)).unwrap());
    }
    files.insert(format!("{DIR}/"), b"<a href=image.sig>".to_vec());
    let server = Server::new(move |request, _| match request.method.as_str() {
        "HEAD" => {
            b"HTTP/1.1 200 OK\r\nContent-Length: 1152921504606846976\r\nConnection: close\r\n\r\n".to_vec()
        }
        _ => whole(&files, request),
    });
    site.config(&source(&server.url));
    let failed = site.mirror(&[]).failed();
    assert!(
        failed.len() == 1 && failed[0].contains("not enough space: 1.00 EiB needed for 1 files, "),
        "{failed:?}"
    );
    assert!(server.gets(&format!("{DIR}/image")).is_empty());
}

/// Files of an older version in the directory of a newer one: each is signed, and none of them says of which it is.
#[test]
fn files_of_another_version() {
    let site = Site::new();
    site.release("stable", "1.0.0", &[("image", b"old")]);
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.config(&source(&nginx.url));
    site.mirror(&[]).good();
    let www = |path: &str| site.www(&format!("stable/amd64-usr/{path}"));
    // What says that it is current is not signed: nobody can sign that.
    let lie = |version: &str| {
        let dir = www(version);
        fs::create_dir_all(&dir).unwrap();
        for name in ["image", "image.sig", "version.txt", "version.txt.sig"] {
            fs::copy(www("1.0.0").join(name), dir.join(name)).unwrap();
        }
        let _ = fs::remove_file(www("current"));
        fs::create_dir_all(www("current")).unwrap();
        fs::write(www("current/version.txt"), format!("FLATCAR_VERSION_ID={version}\n")).unwrap();
    };
    lie("9.9.0");
    let expected =
        ["stable: the server has no signature for what names the current version, which was signed before: \
                     --allow-downgrade takes it"];
    assert_eq!(site.mirror(&[]).failed(), expected);
    let expected = ["all/9.9.0: version.txt: expected version 9.9.0, found 1.0.0"];
    assert_eq!(site.mirror(&["--allow-downgrade"]).failed(), expected);
    assert!(!site.dest("all/9.9.0").exists());
    assert_eq!(fs::read_link(site.dest("stable/current")).unwrap(), Path::new("../all/1.0.0"));
    // Nor without it, nor without its signature.
    for name in ["version.txt.sig", "version.txt"] {
        fs::remove_file(www("9.9.0").join(name)).unwrap();
        let failed = site.mirror(&["--allow-downgrade"]).failed();
        assert!(failed.len() == 1 && failed[0].starts_with("all/9.9.0: version.txt: "), "{failed:?}");
    }

    // One that a mirror has already disappears when it is checked again, and the right one comes back.
    fs::rename(site.dest("all/1.0.0"), site.dest("all/9.9.0")).unwrap();
    for link in ["9.9.0", "current"] {
        let _ = fs::remove_file(site.dest("stable").join(link));
        std::os::unix::fs::symlink("../all/9.9.0", site.dest("stable").join(link)).unwrap();
    }
    fs::remove_dir_all(www("current")).unwrap();
    std::os::unix::fs::symlink("1.0.0", www("current")).unwrap();
    let failed = site.mirror(&["--verify", "--allow-downgrade"]).failed();
    let expected = ["all/9.9.0/version.txt: expected version 9.9.0, found 1.0.0: all/9.9.0 removed"];
    assert_eq!(failed, expected);
    assert!(!site.dest("all/9.9.0").exists());
    assert_eq!(fs::read_link(site.dest("stable/current")).unwrap(), Path::new("../all/1.0.0"));
    assert_eq!(site.mirror(&["--verify"]).good().counts(), (0, 2));
    assert!(fs::symlink_metadata(site.dest("stable/9.9.0")).is_err());
}

/// Indexes that list more than anybody can get.
#[test]
fn endless_indexes() {
    let site = Site::new();
    site.release("stable", "9.0.0", &[("image", b"image")]);
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    let mut config = source(&nginx.url);
    config["sources"][0]["versions"] = json!({"minimum": "1"});
    site.config(&config);
    let listing = |links: usize| -> String { (0..links).map(|i| format!("<a href=8.{i}/>")).collect() };
    site.put("stable/amd64-usr/index.html", listing(1000).as_bytes());
    let failed = site.mirror(&[]).failed();
    let expected =
        "stable amd64: 1001 versions to mirror, more than 1000: keep, or a later minimum, takes fewer";
    assert_eq!(failed, [expected]);
    // With a limit of one's own.
    config["sources"][0]["keep"] = json!(1);
    site.config(&config);
    site.mirror(&[]).good();
    let links = format!("{}/stable/amd64-usr/: an index of more than 20000 links", nginx.url);
    site.put("stable/amd64-usr/index.html", listing(20_001).as_bytes());
    assert_eq!(site.mirror(&[]).failed(), [format!("stable amd64: {links}")]);
    // Too long, whatever it lists.
    site.put("stable/amd64-usr/index.html", &vec![b' '; (4 << 20) + 1]);
    let failed = site.mirror(&[]).failed();
    assert!(failed[0].ends_with("/stable/amd64-usr/: more than 4194304 bytes"), "{failed:?}");
}

#[test]
fn no_more_than_the_limit() {
    let site = Site::new();
    site.release("stable", "1.0.0", &[("image", &[7; 5000]), ("other", &[8; 5000])]);
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.config(&source(&nginx.url));
    let failed = site.mirror(&["--max-download=8K"]).failed();
    assert!(
        failed.len() == 1 && failed[0].ends_with(": more than 8192 bytes in all: --max-download allows more"),
        "{failed:?}"
    );
    assert_eq!(site.mirror(&["--max-download=8K"]).good().counts(), (1, 2));
}

/// What a server calls its files is seen, and does nothing else.
#[test]
fn names_do_not_drive_the_terminal() {
    let site = Site::new();
    site.release("stable", "1.0.0", &[("image", b"image")]);
    let nginx = Nginx::serve(&site.www(""));
    let names = ["\x1b]0;title\x07", "\u{9b}2Jx", "gpj.\u{202e}exe:", "a\r\nfailed b: c"];
    let mut html = "<a href=image.sig><a href=version.txt.sig>".to_owned();
    html.extend(names.map(|name| format!("<a href='{name}'>")));
    site.put(&format!("{DIR}/index.html"), html.as_bytes());
    site.config(&source(&nginx.url));
    let active = |c: char| c.is_control() && c != '\n' || ['\u{202e}', '\u{9b}'].contains(&c);
    let shown = ["\\u001b]0;title\\u0007", "\\u009b2Jx", "gpj.\\u202eexe:"];
    for how in [&[][..], &["--json"]] {
        let output = site.command().args(how).env("REHYDRATOR_LOG", "trace").output().unwrap();
        for text in [text(&output.stdout), text(&output.stderr)] {
            assert!(!text.contains(active), "{text:?}");
        }
        let stdout = text(&output.stdout);
        assert!(output.status.success() && shown.iter().all(|name| stdout.contains(name)), "{stdout}");
        assert!(!stdout.lines().any(|line| line.starts_with("failed b")), "{stdout}");
    }
    // In an error that ends the program, and on the way there.
    site.put("stream.json", b"{\"stream\": \"\\u001b[2J\\u202e\", \"architectures\": {}}");
    let url = format!("{}/stream.json", nginx.url);
    let mut init = rehydrator();
    init.args(["build", "init", "--stream-url", &url, "--workdir"]).arg(site.dir.path());
    ok(&mut init);
    let mut download = rehydrator();
    download.args(["build", "download", "--workdir"]).arg(site.dir.path());
    let error = fails(&mut download);
    assert!(!error.contains(active) && error.contains("no signing keys are known"), "{error:?}");
}
