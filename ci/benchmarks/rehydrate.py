"""From what is stored to disks: time and memory."""

import shutil

from .run import MIB, Failed, Run, best

LOG = {"REHYDRATOR_LOG": "rehydrator=debug"}
LABELS = ("openstack", "nutanix", "hetzner", "metal", "metal4k", "aws", "vmware", "azure", "hyperv", "gcp", "kubevirt")


def rehydrate(bench, report):
    report.say("## Rehydrate to a pipe\n")
    labels = [label for label in LABELS if bench.has_disk(label)]
    qemu = bench.disk(*labels)
    xz = best(bench.args.repeat, ["xz", "-dc", "-T1", qemu.path])
    report.say(f"`xz -dc -T1` of the published {qemu.label} disk: {xz.seconds:.2f} s.\n")
    for profile in bench.args.profile:
        rows = []
        whats = [(label, ["--disk", label]) for label in labels] + [("iso", ["--iso"]), ("pxe", ["--pxe"])]
        for what, options in whats:
            command = bench.rehydrator("rehydrate", "-", *options, "--data", bench.data(profile))
            run = best(bench.args.repeat, command, env=LOG)
            digest, sha = sha256sum(bench, command)
            wanted = [a.sha256 for a in bench.artifacts if a.label == what and a.is_disk or what == a.format == "iso"]
            if wanted and digest not in wanted:
                raise Failed(f"{profile} {what}: {digest} is not what the stream metadata names")
            decodes = run.decodes()
            rows.append([
                what, f"{run.seconds:.2f} s", f"{run.bytes / run.seconds / 1e6:.0f} MB/s", f"{run.first:.2f} s",
                f"{run.rss / MIB:.0f} MiB", f"{xz.seconds / run.seconds:.1f}", f"{run.seconds / sha:.2f}",
                f"{decodes[1] / decodes[0]:.2f}" if decodes and decodes[0] else "–",
            ])
        report.say(f"### Profile {profile}\n")
        report.table(["artifact", "time", "rate", "first byte", "peak memory (anonymous)", "times as fast as that xz",
                      "of sha256sum", "decodes per cluster"], rows)


def sha256sum(bench, command, env=None):
    """What sha256sum says of the bytes that a command makes, and the seconds that it takes for them from a file."""
    path = bench.work / "bytes"
    Run(command, env, keep=path)
    run = best(bench.args.repeat, ["sha256sum", path])
    path.unlink()
    return run.out[:64].decode(), run.seconds


def memory(bench, report):
    report.say("## Memory of profile small\n")
    rows = []

    def measure(what, *options):
        run = Run(bench.rehydrator("rehydrate", *options, "--data", bench.data("small")), env=LOG)
        clusters, decodes = run.decodes() or (0, 0)
        rows.append([what, f"{run.seconds:.1f} s", f"{run.rss / MIB:.0f} MiB", clusters, f"{decodes / max(clusters, 1):.3f}"])

    for memory in ("256M", "512M", "1G"):
        for label in filter(bench.has_disk, ("openstack", "aws", "metal")):
            measure(f"--memory {memory}, {label}", "-", "--disk", label, "--memory", memory)
    out = bench.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    measure("--memory 256M, everything into a directory", out, "--all", "--memory", "256M")
    report.table(["what", "time", "peak memory (anonymous)", "clusters", "decodes per cluster"], rows)
    for path in sorted(out.glob("*.qcow2")) + sorted(out.glob("*.vmdk")) + sorted(out.glob("*.vhdx")):
        Run(["qemu-img", "check", path])
    for path in sorted(out.glob("*.ova")) + sorted(out.glob("*.tar.gz")):
        Run(["tar", "-tf", path])
    report.say("`qemu-img check` of every qcow2, VMDK and VHDX and `tar -tf` of every OVA and tar.gz in that directory: fine.\n")
    shutil.rmtree(out)
