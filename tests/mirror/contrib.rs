//! What is in `contrib/`, checked by those who will read it: systemd, and the schemas of Kubernetes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::mirror::config::validate;
use crate::mirror::site::ok;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn systemd_takes_the_units() {
    const UNITS: [&str; 4] = [
        "rehydrator-mirror.service",
        "rehydrator-mirror.timer",
        "rehydrator-serve.service",
        "rehydrator-serve.socket",
    ];
    let dir = tempfile::tempdir().unwrap();
    for name in UNITS {
        let unit = fs::read_to_string(root("contrib/systemd").join(name)).unwrap();
        // It wants the program to be there.
        let unit = unit.replace("/usr/bin/rehydrator ", concat!(env!("CARGO_BIN_EXE_rehydrator"), " "));
        fs::write(dir.path().join(name), unit).unwrap();
    }
    let verify = |name: &str| {
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no"]).arg(dir.path().join(name));
        let output = command.output().expect("systemd-analyze is needed: install systemd");
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    for name in UNITS {
        let (good, said) = verify(name);
        // It says so of what is not known, and succeeds.
        assert!(good && !said.contains("rehydrator-"), "{said}");
    }
    let bad =
        fs::read_to_string(dir.path().join("rehydrator-mirror.service")).unwrap() + "NoNewPrivilege=yes\n";
    fs::write(dir.path().join("bad-rehydrator-mirror.service"), bad).unwrap();
    assert!(verify("bad-rehydrator-mirror.service").1.contains("NoNewPrivilege"), "it would not say");
}

/// What podman of Debian 13 makes of the quadlets: it keeps to what they demand, and says what it does not know.
#[test]
fn podman_takes_the_quadlets() {
    let quadlet = |dir: &Path| {
        let mut command = Command::new(root("ci/trixie"));
        command.args(["exec", "../libexec/podman/quadlet", "-dryrun", "-no-kmsg-log"]);
        command.env("QUADLET_UNIT_DIRS", dir);
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    let (good, units, said) = quadlet(&root("contrib/systemd"));
    assert!(good, "{said}; ci/trixie podman installs quadlet");
    for name in ["rehydrator-mirror", "rehydrator-serve"] {
        let unit = units.split(&format!("---{name}.service---")).nth(1).unwrap_or_else(|| panic!("{said}"));
        let start = unit.lines().find(|line| line.starts_with("ExecStart=")).unwrap();
        for must in [" --read-only ", " --cap-drop all ", " --security-opt=no-new-privileges "] {
            assert!(start.contains(must), "{start}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bad.container"), "[Container]\nImage=a\nReadonly=true\n").unwrap();
    let (good, _, said) = quadlet(dir.path());
    assert!(!good && said.contains("Readonly"), "it would not say: {said}");
}

/// The objects of a manifest, as JSON.
fn objects(name: &str) -> Vec<String> {
    const SCRIPT: &str =
        "import json, sys, yaml\nfor d in yaml.safe_load_all(sys.stdin): print(json.dumps(d))";
    let manifest = fs::File::open(root("contrib/kubernetes").join(name)).unwrap();
    let json = ok(Command::new("/usr/bin/python3").args(["-c", SCRIPT]).stdin(manifest));
    json.lines().map(str::to_owned).collect()
}

#[test]
fn kubernetes_takes_the_manifests() {
    // Of each file the object that has the pods, and a number in it.
    for (name, kinds, pods, number) in [
        ("mirror-cronjob.yaml", &["PersistentVolumeClaim", "CronJob"][..], 1, "backoffLimit\": 0"),
        ("serve.yaml", &["Deployment", "Service", "HorizontalPodAutoscaler"], 0, "PeriodSeconds\": 640"),
    ] {
        let mut documents = objects(name);
        assert_eq!(documents.len(), kinds.len(), "{name}");
        for (document, kind) in documents.iter().zip(kinds) {
            assert!(document.contains(&format!("\"kind\": \"{kind}\"")), "{document}");
        }
        let good = documents[pods].clone();
        for must in [
            "\"readOnlyRootFilesystem\": true",
            "\"runAsNonRoot\": true",
            "\"seccompProfile\": {\"type\": \"RuntimeDefault\"}",
            "\"allowPrivilegeEscalation\": false",
            "\"capabilities\": {\"drop\": [\"ALL\"]}",
        ] {
            assert!(good.contains(must), "{name}: {must}");
        }
        let (key, value) = number.split_once(' ').unwrap();
        for (right, wrong) in
            [("readOnlyRootFilesystem", "readonlyRootFilesystem"), (number, &*format!("{key} \"{value}\""))]
        {
            assert!(good.contains(right), "{name}: {right}");
            documents.push(good.replace(right, wrong));
        }
        let texts: Vec<&str> = documents.iter().map(String::as_str).collect();
        let verdicts = validate(&root("tests/mirror/kubernetes.schema.json"), &texts);
        let wanted: Vec<bool> = (0..documents.len()).map(|i| i < kinds.len()).collect();
        assert_eq!(verdicts.iter().map(|v| v == "true").collect::<Vec<_>>(), wanted, "{verdicts:?}");
    }
}
