//! What is in `contrib/`, checked by those who will read it: systemd, and the schemas of Kubernetes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::config::validate;
use crate::site::ok;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn systemd_takes_the_units() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["rehydrator-mirror.service", "rehydrator-mirror.timer"] {
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
    for name in ["rehydrator-mirror.service", "rehydrator-mirror.timer"] {
        let (good, said) = verify(name);
        // It says so of what is not known, and succeeds.
        assert!(good && !said.contains("rehydrator-mirror"), "{said}");
    }
    let bad =
        fs::read_to_string(dir.path().join("rehydrator-mirror.service")).unwrap() + "NoNewPrivilege=yes\n";
    fs::write(dir.path().join("bad-rehydrator-mirror.service"), bad).unwrap();
    assert!(verify("bad-rehydrator-mirror.service").1.contains("NoNewPrivilege"), "it would not say");
}

#[test]
fn kubernetes_takes_the_manifests() {
    const SCRIPT: &str =
        "import json, sys, yaml\nfor d in yaml.safe_load_all(sys.stdin): print(json.dumps(d))";
    let manifest = fs::File::open(root("contrib/kubernetes/mirror-cronjob.yaml")).unwrap();
    let json = ok(Command::new("/usr/bin/python3").args(["-c", SCRIPT]).stdin(manifest));
    let mut documents: Vec<&str> = json.lines().collect();
    assert_eq!(documents.len(), 2);
    let misspelt = documents[1].replace("readOnlyRootFilesystem", "readonlyRootFilesystem");
    let misplaced = documents[1].replace("\"backoffLimit\": 0", "\"backoffLimit\": \"0\"");
    documents.extend([misspelt.as_str(), misplaced.as_str()]);
    assert!(documents[2] != documents[1] && documents[3] != documents[1]);
    let verdicts = validate(&root("tests/mirror/kubernetes.schema.json"), &documents);
    assert_eq!(
        verdicts.iter().map(|v| v == "true").collect::<Vec<_>>(),
        [true, true, false, false],
        "{verdicts:?}"
    );
    for must in [
        "\"readOnlyRootFilesystem\": true",
        "\"runAsNonRoot\": true",
        "\"seccompProfile\": {\"type\": \"RuntimeDefault\"}",
        "\"allowPrivilegeEscalation\": false",
        "\"capabilities\": {\"drop\": [\"ALL\"]}",
    ] {
        assert!(documents[1].contains(must), "{must}");
    }
}
