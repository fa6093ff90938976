//! Stream documents: today's shapes parse and lose nothing; names that could do harm are refused; `build init` stores
//! what it was given.

use std::fs;

use rehydrator::catalog::{Catalog, Item};
use rehydrator::http::{Http, Retry};
use rehydrator::openpgp::Keys;
use rehydrator::stream::{self, Stream};
use rehydrator::workdir::{Origin, Workdir};
use serde_json::Value;

const FCOS: &[u8] = include_bytes!("../stream-metadata/samples/fcos.json");
const RHCOS: &[u8] = include_bytes!("../stream-metadata/samples/rhcos.json");

fn items(document: &[u8]) -> Vec<Item> {
    Catalog::new(&Stream::parse(document).unwrap()).unwrap().items
}

/// `platform format`, in the order of the document, each once.
fn formats(items: &[Item], arch: &str) -> String {
    let mut all: Vec<_> =
        items.iter().filter(|i| i.arch == arch).map(|i| format!("{} {}", i.platform, i.format)).collect();
    all.dedup();
    all.join(", ")
}

#[test]
fn every_artifact_of_fedora_coreos() {
    let items = items(FCOS);
    assert_eq!(
        formats(&items, "x86_64"),
        "aliyun qcow2.xz, applehv raw.gz, aws vmdk.xz, azure vhd.xz, azurestack vhd.xz, digitalocean qcow2.gz, \
         exoscale qcow2.xz, gcp tar.gz, hetzner raw.xz, hyperv vhdx.zip, ibmcloud qcow2.xz, kubevirt ociarchive, \
         metal 4k.raw.xz, metal iso, metal pxe, metal raw.xz, nutanix qcow2, openstack qcow2.xz, \
         oraclecloud qcow2.xz, proxmoxve qcow2.xz, qemu qcow2.xz, virtualbox ova, vmware ova, vultr raw.xz"
    );
    assert_eq!(
        formats(&items, "ppc64le"),
        "metal 4k.raw.xz, metal iso, metal pxe, metal raw.xz, openstack qcow2.xz, powervs ova.gz, qemu qcow2.xz"
    );
    let count = |arch| items.iter().filter(|i| i.arch == arch).count();
    assert_eq!(["x86_64", "aarch64", "ppc64le", "s390x"].map(count), [26, 15, 9, 10]);
    let pxe: Vec<_> = items
        .iter()
        .filter(|i| i.arch == "s390x" && i.format == "pxe")
        .map(|i| (i.file.as_str(), i.label()))
        .collect();
    assert_eq!(
        pxe,
        [
            ("kernel", "metal pxe kernel".to_owned()),
            ("initramfs", "metal pxe initramfs".into()),
            ("rootfs", "metal pxe rootfs".into())
        ]
    );
    assert!(items.iter().all(|i| i.signature.as_deref() == Some(&format!("{}.sig", i.location))));
}

#[test]
fn every_artifact_of_rhel_coreos() {
    let items = items(RHCOS);
    assert_eq!(
        formats(&items, "s390x"),
        "ibmcloud qcow2.gz, kubevirt ociarchive, metal 4k.raw.gz, metal iso, metal pxe, metal raw.gz, \
         openstack qcow2.gz, qemu qcow2.gz, qemu-secex qcow2.gz"
    );
    assert!(formats(&items, "aarch64").contains("nvidiabluefield bfb"));
    assert!(items.iter().all(|i| i.signature.is_none()));
    assert!(items.iter().any(|i| i.name.ends_with("-live-kernel-ppc64le")));
}

/// Also fields, formats and architectures that nobody has heard of yet.
#[test]
fn nothing_of_a_document_is_lost() {
    let unheard = br#"{"stream": "s", "new": [1, {"x": null}], "architectures": {
        "riscv64": {"artifacts": {"toaster": {"release": "1", "formats": {"toast.br": {"disk": {
            "location": "https://h/t.toast.br", "sha256":
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "size": 5}}}, "n": 1}},
            "images": {"toaster": {"k": 1.5}}, "more": true},
        "empty": {}}}"#;
    for document in [FCOS, RHCOS, unheard] {
        let before: Value = serde_json::from_slice(document).unwrap();
        let after = serde_json::to_value(Stream::parse(document).unwrap()).unwrap();
        let mut expected = before.clone();
        if document == unheard {
            // What is absent is an empty object afterwards.
            expected["architectures"]["empty"] = serde_json::json!({"artifacts": {}});
        }
        assert_eq!(after, expected);
    }
    assert_eq!(items(unheard)[0].name, "t.toast.br");
}

#[test]
fn the_name_of_the_output() {
    let items = items(FCOS);
    let name = |platform: &str, format: &str| {
        let item = items.iter().find(|i| i.arch == "x86_64" && i.platform == platform && i.format == format);
        item.unwrap().output_name().rsplit_once("x86_64").unwrap().1.to_owned()
    };
    assert_eq!(name("openstack", "qcow2.xz"), ".qcow2");
    assert_eq!(name("applehv", "raw.gz"), ".raw");
    assert_eq!(name("hyperv", "vhdx.zip"), ".vhdx");
    // No digest of what is inside: the file as published.
    assert_eq!(name("gcp", "tar.gz"), ".tar.gz");
    assert_eq!(name("kubevirt", "ociarchive"), ".ociarchive");
    assert_eq!(name("metal", "iso"), ".iso");
}

/// A document with two artifacts, for these locations.
fn two(a: &str, b: &str) -> String {
    let digest = "0".repeat(64);
    format!(
        r#"{{"stream": "s", "architectures": {{"x86_64": {{"artifacts": {{
        "metal": {{"formats": {{"iso": {{"disk": {{"location": "{a}", "sha256": "{digest}"}}}}}}}},
        "qemu": {{"formats": {{"qcow2.xz": {{"disk": {{"location": "{b}", "sha256": "{digest}",
            "uncompressed-sha256": "{digest}"}}}}}}}}}}}}}}}}"#
    )
}

#[test]
fn harmful_names_are_refused() {
    let ok = "https://h/ok.iso";
    let error = |a: &str, b: &str| {
        let stream = Stream::parse(two(a, b).as_bytes()).unwrap();
        format!("{:#}", Catalog::new(&stream).map(|_| ()).unwrap_err())
    };
    for bad in ["https://h/a/..", "https://h/", "https://h/.", r"https://h/a\\b", "https://h/a\\u0000", ""] {
        let message = error(bad, ok);
        assert!(message.starts_with("artifact x86_64 metal iso: location"), "{bad}: {message}");
        assert!(message.contains("not a file name"), "{bad}: {message}");
    }
    // Fine as it is, but not without the suffix.
    assert!(error(ok, "https://h/...gz").contains(r#"not a file name: "..""#));
    let long = format!("https://h/{}", "x".repeat(250));
    assert!(error(&long, ok).contains("not a file name"));
    for beside in ["a.sig", "a.partial", "a.etag"] {
        assert!(error(&format!("https://h/{beside}"), ok).contains("may not end in"));
    }
    // The same name, and the same name once it is uncompressed.
    assert_eq!(error(ok, ok), "artifact x86_64 qemu: another artifact is named ok.iso, too");
    assert_eq!(
        error("https://h/a", "https://g/a.xz"),
        "artifact x86_64 qemu: another artifact is named a, too"
    );
}

#[test]
fn wrong_documents_are_refused() {
    let error = |json: &str| format!("{:#}", Stream::parse(json.as_bytes()).map(|_| ()).unwrap_err());
    for json in
        ["", "[]", "{}", r#"{"stream": 1, "architectures": {}}"#, "{\"stream\": \"s\", \"architectures\": ["]
    {
        assert!(error(json).starts_with("stream metadata: not a stream document: "), "{json}");
    }
    let twice = r#"{"stream": "s", "architectures": {"x86_64": {}, "x86_64": {}}}"#;
    assert!(error(twice).contains(r#""x86_64" appears twice"#));
    let deep = format!(r#"{{"stream": "s", "architectures": {{}}, "x": {}"#, "[".repeat(1_000_000));
    assert!(error(&deep).contains("recursion limit"));

    let short = two("https://h/a", "https://h/b").replace(&"0".repeat(64), &"0".repeat(63));
    let stream = Stream::parse(short.as_bytes()).unwrap();
    let message = format!("{:#}", Catalog::new(&stream).map(|_| ()).unwrap_err());
    assert!(message.starts_with("artifact x86_64 metal iso: sha256: not a sha256 digest"), "{message}");
}

#[test]
fn architectures_are_chosen() {
    let catalog = Catalog::new(&Stream::parse(FCOS).unwrap()).unwrap();
    assert_eq!(catalog.clone().only(&["s390x".into(), "ppc64le".into()]).unwrap().items.len(), 19);
    let message = catalog.only(&["vax".into()]).unwrap_err().to_string();
    assert_eq!(message, r#"the stream has nothing for architecture "vax""#);
}

#[test]
fn streams_known_by_name() {
    let url = |id| stream::url_of(id).unwrap();
    assert_eq!(url("fcos-next"), "https://builds.coreos.fedoraproject.org/streams/next.json");
    let installer = "https://raw.githubusercontent.com/openshift/installer/";
    assert_eq!(url("rhcos-4.9"), format!("{installer}release-4.9/data/data/rhcos-stream.json"));
    assert_eq!(url("rhcos-4.10"), format!("{installer}release-4.10/data/data/coreos/rhcos.json"));
    assert_eq!(url("rhcos-4.21"), format!("{installer}release-4.21/data/data/coreos/rhcos.json"));
    assert_eq!(url("rhcos-4.22"), format!("{installer}release-4.22/data/data/coreos/coreos-rhel-9.json"));
    assert_eq!(
        url("rhcos-4.22-rhel-10"),
        format!("{installer}release-4.22/data/data/coreos/coreos-rhel-10.json")
    );
    for id in [
        "stable",
        "fcos-",
        "rhcos-4.7",
        "rhcos-4.",
        "rhcos-4.N",
        "rhcos-4.010",
        "rhcos-4.+10",
        "rhcos-4.21-rhel-10",
    ] {
        let message = stream::url_of(id).unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("no stream is named {id:?}: known are fcos-stable, ")),
            "{message}"
        );
    }
}

#[test]
fn keys_of_the_known_streams() {
    for id in ["stable", "testing", "next"] {
        let mut keys = Keys::default();
        for key in stream::keys_of(id).unwrap() {
            keys.add(key.as_bytes()).unwrap();
        }
        assert_eq!(
            keys.fingerprints().collect::<Vec<_>>(),
            [
                "36F612DCF27F7D1A48A835E4DBFCF71C6D9F90A6",
                "4F50A6114CD5C6976A7F1179655A4B02F577861E",
                "D924B10D3E810DABDD8B56B596E7E91491211FCE"
            ]
        );
    }
    assert!(stream::keys_of("rhcos-4.20").unwrap().is_empty());
}

#[test]
fn init_from_a_file_stores_it_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let workdir = Workdir::new(dir.path().join("new/work"));
    let http = Http::new(Retry::default()).unwrap();
    // White space, line ends and escapes that no serializer would write like this.
    let document =
        two("https://h/a", "https://h/b").replace(": ", "  :\r\n\t").replace("metal", "met\\u0061l") + "\n\n";
    let file = dir.path().join("given.json");
    fs::write(&file, &document).unwrap();
    fs::write(dir.path().join("given.json.sig"), b"a signature").unwrap();
    assert_eq!(workdir.init(&Origin::File(file.clone()), &http).unwrap().stream, "s");
    assert_eq!(fs::read(workdir.stream()).unwrap(), document.as_bytes());
    assert_eq!(fs::read(workdir.stream_signature()).unwrap(), b"a signature");

    // A document that is none leaves what was there; one without a signature takes the old one away.
    fs::write(&file, "{").unwrap();
    let message = format!("{:#}", workdir.init(&Origin::File(file.clone()), &http).unwrap_err());
    assert!(message.starts_with("stream metadata: not a stream document"), "{message}");
    assert_eq!(fs::read(workdir.stream()).unwrap(), document.as_bytes());
    fs::write(&file, FCOS).unwrap();
    fs::remove_file(dir.path().join("given.json.sig")).unwrap();
    workdir.init(&Origin::File(file), &http).unwrap();
    assert_eq!(fs::read(workdir.stream()).unwrap(), FCOS);
    assert!(!workdir.stream_signature().exists());

    let nothing = Origin::File(dir.path().join("nothing"));
    assert!(format!("{:#}", workdir.init(&nothing, &http).unwrap_err()).contains("nothing: read failed"));
    let message = format!("{:#}", Workdir::new(dir.path()).read_stream().unwrap_err());
    assert!(message.contains("no such file; `rehydrator build init` makes it"), "{message}");
}
