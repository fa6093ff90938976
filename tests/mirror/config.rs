//! Configurations: what is accepted, what is refused and how it is named, by the program and by the schema alike.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use rehydrator::mirror::filter::{Filter, Filters};
use rehydrator::mirror::version::compare;
use serde_json::Value;

use crate::mirror::site::{Site, fails, ok, rehydrator, text};

/// A configuration, and what the program says of it; `""` when it is good.
fn table() -> Vec<(&'static str, &'static str)> {
    vec![
        // oppositus's own.
        (r#"{}"#, ""),
        (r#"{"channels": ["stable", "beta"], "filters": ["+ a[._]*", "- *"]}"#, ""),
        (r#"{"channels": null, "filters": null}"#, ""),
        (r#"{"channels": ["lts-2022"], "keys": ["keys"], "parallel": 8, "rate": "10M"}"#, ""),
        (r#"{"channels": []}"#, "channels: there is none"),
        (r#"{"channels": ["a", "a"]}"#, "channels[1]: \"a\" appears twice"),
        (r#"{"channels": ["../x"]}"#, "channels[0]: not the name of a channel: \"../x\""),
        (r#"{"channels": ["all"]}"#, "channels[0]: \"all\" is taken"),
        (r#"{"channels": ["current"]}"#, "channels[0]: not the name of a channel: \"current\""),
        (r#"{"channels": "stable"}"#, "channels: invalid type: string \"stable\", expected a sequence"),
        (r#"{"chanels": ["stable"]}"#, "chanels: unknown field `chanels`, expected one of `channels`, "),
        (r#"{"filters": ["a"]}"#, "filters[0]: not a filter: \"a\" does not start with \"+ \" or \"- \""),
        (r#"{"filters": ["+a"]}"#, "filters[0]: not a filter: \"+a\" does not start with \"+ \" or \"- \""),
        (r#"{"filters": ["+ a", "- [a"]}"#, "filters[1]: not a filter: \"- [a\": [ without ]"),
        (r#"{"filters": ["- a\\"]}"#, "filters[0]: not a filter: \"- a\\\\\": nothing after \\"),
        (
            r#"{"filters": ["- []"]}"#,
            "filters[0]: not a filter: \"- []\": - or ] where a class must have a character",
        ),
        (
            r#"{"filters": ["- [a-]"]}"#,
            "filters[0]: not a filter: \"- [a-]\": - or ] where a class must have a character",
        ),
        (r#"{"filters": ["+", "-   *", "+ ]", "- [^a-z\\]]"]}"#, ""),
        (r#"{"filters": [1]}"#, "filters[0]: invalid type: integer `1`, expected a string"),
        (r#"{"keep": 2}"#, "keep: needs sources: without, the mirror is that of oppositus"),
        (r#"{"keys": null}"#, "keys: invalid type: null, expected a sequence"),
        (r#"{"parallel": 0}"#, "parallel: must be from 1 to 64"),
        (r#"{"parallel": 65}"#, "parallel: must be from 1 to 64"),
        (r#"{"parallel": "4"}"#, "parallel: invalid type: string \"4\", expected usize"),
        (r#"{"rate": 0}"#, "rate: must be more than 0"),
        (r#"{"rate": "0M"}"#, "rate: must be more than 0"),
        (r#"{"rate": 5000}"#, ""),
        (r#"{"rate": "1.5M"}"#, "rate: not a size: \"1.5M\""),
        (r#"{"rate": "fast"}"#, "rate: not a size: \"fast\""),
        (r#"{"rate": true}"#, "rate: expected a number of bytes, or a text such as \"10M\""),
        (r#"[]"#, "invalid type: sequence, expected an object"),
        (r#"[["stable"]]"#, "invalid type: sequence, expected an object"),
        (r#"{"sources": [["stream"]]}"#, "sources[0]: invalid type: sequence, expected an object"),
        (
            r#"{"sources": [{"type": "stream", "versions": [["1"]]}]}"#,
            "sources[0].versions: invalid type: sequence",
        ),
        // What it has become.
        (r#"{"sources": []}"#, "sources: there is none"),
        (r#"{"sources": [{}]}"#, "sources[0]: missing field `type`"),
        (r#"{"sources": [{"type": "ostree"}]}"#, "sources[0].type: unknown variant `ostree`"),
        (r#"{"sources": [{"type": "container-linux"}]}"#, ""),
        (r#"{"sources": [{"type": "stream"}]}"#, ""),
        (
            r#"{"sources": [{"type": "stream"}], "channels": ["stable"]}"#,
            "channels: belongs to an entry of sources",
        ),
        (r#"{"sources": [{"type": "stream", "colour": 1}]}"#, "sources[0].colour: unknown field `colour`"),
        (
            r#"{"sources": [{"type": "stream", "channels": ["stable"]}]}"#,
            "sources[0]: channels: not for a source of this type",
        ),
        (
            r#"{"sources": [{"type": "container-linux", "streams": ["stable"]}]}"#,
            "sources[0]: streams: not for a source",
        ),
        (
            r#"{"sources": [{"type": "container-linux", "formats": ["iso"]}]}"#,
            "sources[0]: formats: not for a source",
        ),
        (
            r#"{"sources": [{"type": "container-linux", "unsigned": true}]}"#,
            "sources[0]: unsigned: not for a source",
        ),
        (
            r#"{"sources": [{"type": "container-linux", "releases": "http://x/"}]}"#,
            "sources[0]: releases: not for a source",
        ),
        (
            r#"{"sources": [{"type": "container-linux", "name": "flatcar", "url": "https://{channel}.example/{arch}-usr",
                "channels": ["stable", "lts"], "architectures": ["amd64", "arm64"], "filters": ["- *.vmdk"],
                "keys": ["keys", "keys/signer.asc"], "keep": 3, "versions": {"minimum": "3510.2"}}], "keep": 1}"#,
            "",
        ),
        (
            r#"{"sources": [{"type": "stream", "name": "fcos", "url": "https://example/{stream}.json", "formats": ["iso"],
                "releases": "https://example/{stream}/releases.json", "streams": ["stable", "next"], "unsigned": false,
                "architectures": [], "versions": {"pin": ["44.20260707.3.1"]}, "keep": 2}]}"#,
            "",
        ),
        (r#"{"sources": [{"type": "stream", "streams": ["rhcos-4.21"], "unsigned": true}]}"#, ""),
        (r#"{"sources": [{"type": "stream", "keep": 0}]}"#, "sources[0]: keep: must be at least 1"),
        (
            r#"{"sources": [{"type": "stream", "keep": null}]}"#,
            "sources[0].keep: invalid type: null, expected usize",
        ),
        (r#"{"sources": [{"type": "stream", "name": ""}]}"#, "sources[0]: name: it is empty"),
        (
            r#"{"sources": [{"type": "stream", "name": "a/b"}]}"#,
            "sources[0]: name: not the name of a directory: \"a/b\"",
        ),
        (r#"{"sources": [{"type": "stream", "name": "streams"}]}"#, "sources[0]: name: \"streams\" is taken"),
        (
            r#"{"sources": [{"type": "stream", "name": ".hidden"}]}"#,
            "sources[0]: name: not the name of a directory: \".hidden\"",
        ),
        (
            r#"{"sources": [{"type": "container-linux", "architectures": []}]}"#,
            "sources[0]: architectures: there is none",
        ),
        (
            r#"{"sources": [{"type": "stream", "architectures": ["x/y"]}]}"#,
            "sources[0]: architectures[0]: not the name",
        ),
        (r#"{"sources": [{"type": "stream", "versions": {}}]}"#, ""),
        (
            r#"{"sources": [{"type": "stream", "versions": {"pin": []}}]}"#,
            "sources[0]: versions.pin: there is none",
        ),
        (
            r#"{"sources": [{"type": "stream", "versions": {"pin": ["1"], "minimum": "1"}}]}"#,
            "sources[0]: versions: either",
        ),
        (
            r#"{"sources": [{"type": "stream", "versions": {"maximum": "1"}}]}"#,
            "sources[0].versions.maximum: unknown field",
        ),
        (
            r#"{"sources": [{"type": "stream", "url": "ftp://x/"}]}"#,
            "sources[0]: url: \"ftp://x/\": neither http nor https",
        ),
        (r#"{"sources": [{"type": "stream", "url": "x"}]}"#, "sources[0]: url: \"x\": not a URL"),
        (
            r#"{"sources": [{"type": "stream", "url": "http://x/?y"}]}"#,
            "sources[0]: url: \"http://x/?y\": has a query",
        ),
    ]
}

/// What only the program can check.
const BEYOND: [(&str, &str); 8] = [
    (r#"{"keys": ["none"]}"#, "keys "),
    (r#"{"channels": ["stable"], "channels": ["beta"]}"#, "duplicate field `channels`"),
    (r#"{} {}"#, "trailing characters"),
    (
        r#"{"sources": [{"type": "stream"}, {"type": "container-linux"}]}"#,
        "sources[1]: stable is where sources[0] is mirrored to: give one of them a name",
    ),
    (
        r#"{"sources": [{"type": "stream"}, {"type": "container-linux", "name": "stable"}]}"#,
        "sources[1].name: \"stable\" is a channel of sources[0]",
    ),
    (
        r#"{"sources": [{"type": "container-linux", "url": "http://x/{stream}"}]}"#,
        "sources[0]: url: \"http://x/{stream}\": only {channel} and {arch} can be filled in",
    ),
    (
        r#"{"sources": [{"type": "container-linux", "url": "http://x/", "channels": ["a", "b"]}]}"#,
        "sources[0]: url: needs {channel}, because there are several",
    ),
    (
        r#"{"sources": [{"type": "stream", "streams": ["none"]}]}"#,
        "sources[0]: url: no stream is named \"none\"",
    ),
];

#[test]
fn the_program_names_what_is_wrong() {
    let site = Site::new();
    let keys = site.dir.path().join("keys");
    let config = site.dir.path().join("config.json");
    for (json, expected) in table().into_iter().chain(BEYOND) {
        println!("{json}");
        fs::write(&config, json).unwrap();
        let mut check = rehydrator();
        check.args(["mirror", "releases", "--check"]).arg(&config).arg("--key").arg(&keys);
        if expected.is_empty() {
            assert_eq!(ok(&mut check), format!("{}: good\n", config.display()), "{json}");
        } else {
            let message = fails(&mut check);
            let start = format!("rehydrator: configuration {}: {expected}", config.display());
            assert!(
                message.starts_with(&start)
                    || (BEYOND.iter().any(|b| b.0 == json) && message.contains(expected)),
                "{json}\nexpected {expected}\ngot {message}"
            );
        }
    }
    // Without --key the key must be in the configuration, and neither is optional.
    fs::write(&config, "{}").unwrap();
    let message = fails(rehydrator().args(["mirror", "releases", "--check"]).arg(&config));
    assert!(message.contains("keys: there are none: name those that sign, here or with --key"), "{message}");
    let message = fails(rehydrator().args(["mirror", "releases", "--check", "none.json"]));
    assert!(message.contains("configuration none.json: read failed"), "{message}");
    assert!(!site.dest("").exists());
}

/// What a real validator says of documents, given one a line: `true` or why not.
pub(crate) fn validate(schema: &Path, documents: &[&str]) -> Vec<String> {
    const SCRIPT: &str = r#"
import json, sys, jsonschema
schema = json.load(open(sys.argv[1]))
cls = jsonschema.validators.validator_for(schema)
cls.check_schema(schema)
for line in sys.stdin:
    errors = list(cls(schema).iter_errors(json.loads(line)))
    print("; ".join(e.message for e in errors).replace("\n", " ") or "true")
"#;
    // Not the first python3 of the PATH, which may lack the module that the distribution's has.
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", SCRIPT]).arg(schema);
    let mut child =
        python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    for document in documents {
        writeln!(input, "{}", document.replace('\n', " ")).unwrap();
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "python3-jsonschema is needed: {}", text(&output.stderr));
    text(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn the_schema_says_the_same() {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/mirror.schema.json");
    let table = table();
    let documents: Vec<_> = table.iter().map(|(json, _)| *json).collect();
    let verdicts = validate(&schema, &documents);
    assert_eq!(verdicts.len(), table.len());
    for ((json, expected), verdict) in table.iter().zip(verdicts) {
        assert_eq!(
            verdict == "true",
            expected.is_empty(),
            "{json}\nprogram: {expected:?}\nschema: {verdict}"
        );
    }
    // The schema has every key that the program has.
    let schema: Value = serde_json::from_slice(&fs::read(schema).unwrap()).unwrap();
    let keys = |pointer: &str| -> Vec<&str> {
        let mut keys: Vec<_> =
            schema.pointer(pointer).unwrap().as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort();
        keys
    };
    assert_eq!(keys("/properties"), ["channels", "filters", "keep", "keys", "parallel", "rate", "sources"]);
    let guide = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/mirror.md")).unwrap();
    for list in ["/properties", "/$defs/containerLinux/properties", "/$defs/stream/properties"] {
        for key in keys(list) {
            assert!(guide.contains(&format!("| `{key}` |")), "docs/mirror.md has no row for {key}");
        }
    }
}

#[test]
fn filters_as_in_oppositus() {
    // Glob, name, whether it matches: what path.Match of Go says.
    let globs = [
        ("*", "foo", true),
        ("", "", true),
        ("", "x", false),
        ("abc", "abc", true),
        ("*c", "abc", true),
        ("a*", "a", true),
        ("a*", "abc", true),
        ("a*b*c*d*e*", "axbxcxdxe", true),
        ("a*b*c*d*e*", "axbxcxdxexxx", true),
        ("a*b?c*x", "abxbbxdbxebxczzx", true),
        ("a*b?c*x", "abxbbxdbxebxczzy", false),
        ("ab[c]", "abc", true),
        ("ab[b-d]", "abc", true),
        ("ab[e-g]", "abc", false),
        ("ab[^c]", "abc", false),
        ("ab[^b-d]", "abc", false),
        ("ab[^e-g]", "abc", true),
        ("ab[!c]", "abc", true),
        ("ab[!c]", "ab!", true),
        ("ab[!c]", "abd", false),
        ("a\\*b", "a*b", true),
        ("a\\*b", "ab", false),
        ("a?b", "a☺b", true),
        ("a[^a]b", "a☺b", true),
        ("a???b", "a☺b", false),
        ("[a-ζ]*", "α", true),
        ("*[a-ζ]", "A", false),
        ("[\\]a]", "]", true),
        ("[\\-]", "-", true),
        ("[x\\-]", "x", true),
        ("[x\\-]", "z", false),
        ("[\\-x]", "-", true),
        ("*x", "xxx", true),
        ("{a,b}", "a", false),
        ("{a,b}", "{a,b}", true),
        ("**", "ab", true),
        ("coreos_production_pxe[._]*", "coreos_production_pxe.sh", true),
        ("coreos_production_pxe[._]*", "coreos_production_pxe_image.cpio.gz", true),
        ("coreos_production_pxe[._]*", "coreos_production_pxelinux", false),
        ("coreos_production_pxe[._]*", "coreos_production_pxe", false),
        ("*.vmdk", "Image.VMDK", false),
        ("*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b", &"a".repeat(200), false),
    ];
    for (glob, name, expected) in globs {
        let filters = Filters(vec![Filter::parse(&format!("- {glob}")).unwrap()]);
        assert_eq!(!filters.take(name), expected, "{glob} {name}");
    }
    // The first that matches decides, none includes.
    let lists: [(&[&str], &str, bool); 8] = [
        (&["+ *"], "foo", true),
        (&["- *"], "foo", false),
        (&["+ does-not-match"], "foo", true),
        (&["- does-not-match", "+ foo*", "- *"], "foobar", true),
        (&["- foo*", "+ foobar"], "foobar", false),
        (&["+\tfoo", "-  *"], "foo", true),
        (&["+\tfoo", "-  *"], "bar", false),
        (&[], "foo", true),
    ];
    for (list, name, expected) in lists {
        let filters = Filters(list.iter().map(|f| Filter::parse(f).unwrap()).collect());
        assert_eq!(filters.take(name), expected, "{list:?} {name}");
    }
}

#[test]
fn versions_are_ordered_by_number() {
    let ordered = [
        "4.0-rc1",
        "4.0-rc2",
        "4.0.1",
        "4.0.2",
        "4.0.10",
        "4.1",
        "44.20260101.3.0",
        "44.20260707.3.1",
        "899.17.0",
        "1010.3.0",
    ];
    for (i, a) in ordered.iter().enumerate() {
        for (j, b) in ordered.iter().enumerate() {
            assert_eq!(compare(a, b), i.cmp(&j), "{a} {b}");
        }
    }
}
