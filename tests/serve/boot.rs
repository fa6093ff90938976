//! Booting over the network: the chain of URLs, and a machine that follows it.

use std::fs;
use std::os::unix::fs::symlink;

use crate::serve::{live_files, releases, write_live};
use crate::tools::example::{ok, tool};
use crate::tools::serve::Serve;
use crate::tools::small::sh;

#[test]
fn boots_over_the_network() {
    let (disks, live) = releases();
    let configs = tempfile::tempdir().unwrap();
    fs::write(configs.path().join("a.ign"), "{}").unwrap();
    symlink("/etc/passwd", configs.path().join("b.ign")).unwrap();
    let serve = Serve::start(&[&live, &disks], &["--ignition", configs.path().to_str().unwrap()]);
    let script = serve.text("/boot.ipxe?ignition=http://h/${mac:hexhyp}.ign");
    assert!(
        script.starts_with("#!ipxe\n") && script.contains("ignition.config.url=http://h/${mac:hexhyp}.ign")
    );
    assert_eq!(serve.text("/boot/stable/x86_64.ipxe"), serve.text("/boot.ipxe"));
    let base = script.lines().find_map(|l| l.strip_prefix("set base ")).unwrap();
    let mut found = 0;
    for word in script.split_whitespace() {
        let word = word.strip_prefix("coreos.live.rootfs_url=").unwrap_or(word);
        if let Some(name) = word.strip_prefix("${base}") {
            let url = format!("{base}{name}");
            assert_eq!(serve.get(url.strip_prefix(&serve.url).unwrap()).len(), 3_000_000);
            found += 1;
        }
    }
    assert_eq!(found, 3, "{script}");
    assert_eq!(serve.text("/ignition/a.ign"), "{}");
    for path in
        ["/ignition/b.ign", "/ignition/c.ign", "/ignition/", "/boot/stable/riscv64.ipxe", "/boot/x.ipxe"]
    {
        assert_eq!(serve.head(&[path]).0, 404, "{path}");
    }
    assert_eq!(serve.head(&["/boot.ipxe?ignition=http://h/a%20b"]).0, 400);
}

/// What the initramfs runs: it says on the serial line how the kernel was called, and ends the machine.
const INIT: &str = r#"
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <unistd.h>
int main(void) {
    char line[4096];
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, 0);
    mknod("/serial", S_IFCHR | 0600, makedev(4, 64));
    int in = open("/proc/cmdline", O_RDONLY), out = open("/serial", O_WRONLY);
    long n = read(in, line, sizeof line);
    write(out, "called with ", 12);
    write(out, line, n);
    tcdrain(out);
    reboot(RB_AUTOBOOT);
}
"#;

/// A machine whose firmware is iPXE loads a kernel of Debian from the server and runs it.
#[test]
fn a_machine_boots() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write(dir.path().join("init.c"), INIT).unwrap();
    sh(dir.path(), "cc -static -Os -o init init.c; echo init | cpio --quiet -o -H newc > initramfs");
    // The kernel that the examples have.
    let find = format!(
        "say() {{ echo \"$@\" >&2; }}; WORK=$PWD; . {}/ci/stream/content.sh; ln -s \"$(find_kernel /none)\" kernel",
        env!("CARGO_MANIFEST_DIR")
    );
    sh(dir.path(), &find);
    let live = dir.path().join("live");
    let file = |name: &str| fs::read(dir.path().join(name)).unwrap();
    let [_, _, rootfs, iso] = live_files();
    write_live(&live, &[file("kernel"), file("initramfs"), rootfs, iso]);
    let serve = Serve::start(&[&live], &[]);

    // 10.0.2.2 is this machine, as that one sees it.
    let here = format!("http://10.0.2.2:{}", serve.port());
    let script = format!("{here}/boot.ipxe?ignition=http://10.0.2.2/%24%7Bmac:hexhyp%7D.ign");
    // Debian's own packages of qemu do not go together with newer ones: that of the tree is in nobody's way.
    let trixie = concat!(env!("CARGO_MANIFEST_DIR"), "/ci/trixie");
    let tree = String::from_utf8(ok(tool(trixie).arg("--where"))).unwrap();
    let mut machine = tool("timeout");
    machine.args(["300", trixie, "exec", "qemu-system-x86_64"]);
    for roms in ["qemu", "seabios"] {
        machine.args(["-L", &format!("{}/usr/share/{roms}", tree.trim())]);
    }
    machine.args(["-machine", "pc,accel=tcg", "-m", "512", "-nodefaults"]);
    machine.args(["-display", "none", "-serial", "stdio", "-no-reboot", "-boot", "n"]);
    machine.args(["-netdev", &format!("user,id=net,bootfile={script}")]);
    machine.args(["-device", "virtio-net-pci,netdev=net,mac=52:54:00:00:00:07"]);
    let said = String::from_utf8(ok(&mut machine)).unwrap();
    let called =
        said.lines().find_map(|line| line.strip_prefix("called with ")).unwrap_or_else(|| panic!("{said}"));
    for argument in [
        &*format!(
            "coreos.live.rootfs_url={here}/prod/streams/stable/builds/44.1/x86_64/coreos-44-metal.x86_64-rootfs.pxe"
        ),
        "ignition.firstboot",
        "ignition.platform.id=metal",
        "ignition.config.url=http://10.0.2.2/52-54-00-00-00-07.ign",
    ] {
        assert!(called.split_whitespace().any(|word| word == argument), "{argument}: {called}");
    }
}
