"""The short form, for continuous integration: a few ratios to peers that hold still, against those that are committed.

Sizes are the same each time. Of times it is the processor time that is compared: the median of several runs that take turns
with those of the peer. A ratio that seems to fall is measured again before it counts, and the median is then over all runs.
The instructions that a processor has make one side faster and not the other, so the ratios are kept for each set of them; on a
processor with another set, times are printed and not compared.
"""

import json
import platform
import re
import shutil
import statistics
import subprocess
from pathlib import Path

from .peers import plain
from .rehydrate import sha256sum
from .release import CI, decompress, size_of
from .run import Failed, Run, all_in_turn

COMMITTED = CI / "bench-ratios.json"
# One of each kind; all of a release would take several times as long, and say no more.
PLATFORMS = ("qemu", "openstack", "aws", "hetzner", "metal")
FALL = 0.25
RUNS, ROUNDS = 5, 3
ZSTD = ["zstd", "-q", "-9", "--long=27", "-c"]


def short(bench, report):
    report.say("## Short form\n")
    bench = part_of(bench)
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    kind = instructions()
    times = committed.get("time", {}).get(kind, {})
    # Sizes are of what dehydrate leaves.
    found = {"time": {**dehydrate(bench, times), **rehydrate(bench, times)}, "size": sizes(bench)}
    if bench.args.update:
        ratios = {which: {what: round(peer / ours, 3) for what, (peer, ours) in of.items()} for which, of in found.items()}
        committed = {"size": ratios["size"], "time": {**committed.get("time", {}), kind: ratios["time"]}}
        COMMITTED.write_text(json.dumps(committed, indent=2, sort_keys=True) + "\n")
        times = committed["time"][kind]
    rows = []
    for which, before in (("size", committed.get("size", {})), ("time", times)):
        for what, (peer, ours) in found[which].items():
            ratio, was = peer / ours, before.get(what)
            unit = "bytes" if which == "size" else "s"
            rows.append([what, *(f"{n:,} {unit}" if which == "size" else f"{n:.3f} {unit}" for n in (peer, ours)), f"{ratio:.3f}",
                         was or "–", f"{ratio / was - 1:+.0%}" if was else ""])
            if was and ratio < was * (1 - FALL):
                report.missed.append(f"{what}: {ratio:.3f} times, {was} is committed")
    report.say(f"How many times the peer takes of what the program takes, in bytes or in processor time; fails below {1 - FALL:.0%} of what is "
               f"committed in {COMMITTED.name}. Instructions of this processor: {kind}"
               + ("" if times else "; for those nothing is committed, so that times are not compared") + ".\n")
    report.table(["what and peer", "peer", "program", "ratio", "committed", "change"], rows)


def part_of(bench):
    """The same release with fewer platforms, and of metal the live system only."""
    release = bench.work / "release"
    release.mkdir(exist_ok=True)
    of_arch = bench.stream["architectures"][bench.arch]
    of_arch["artifacts"] = {name: of_arch["artifacts"][name] for name in PLATFORMS}
    formats = of_arch["artifacts"]["metal"]["formats"]
    of_arch["artifacts"]["metal"]["formats"] = {live: formats[live] for live in ("iso", "pxe")}
    (release / "stream.json").write_text(json.dumps(bench.stream))
    (release / ".make-stream").write_text(bench.options)
    if not (release / "builds").exists():
        (release / "builds").symlink_to((bench.release / "builds").resolve())
    return bench.of(release, bench.work)


def median(runs):
    """That of their processor times."""
    return statistics.median(run.cpu for run in runs)


def sizes(bench):
    """All plain files through one zstd, as tar makes them without their holes, and the live rootfs."""
    every = bench.work / "all.zst"
    with open(every, "wb") as out:
        zstd = subprocess.Popen(ZSTD, stdin=subprocess.PIPE, stdout=out)
        for artifact in bench.artifacts:
            path = plain(artifact, bench.work / "plain")
            subprocess.run(["tar", "--sparse", "-c", "-f", "-", "-C", path.parent, path.name], stdout=zstd.stdin, check=True)
        zstd.stdin.close()
        if zstd.wait():
            raise Failed(f"{ZSTD}: exit status {zstd.returncode}")
    rootfs = next(a for a in bench.artifacts if a.file == "rootfs").path.stat().st_size
    small, fast = (size_of(bench.data(profile)) for profile in ("small", "fast"))
    return {
        "dehydrated, small: `tar --sparse` and `zstd -9 --long=27`": (every.stat().st_size, small),
        "dehydrated, fast: `tar --sparse` and `zstd -9 --long=27`": (every.stat().st_size, fast),
        "dehydrated, small: live rootfs": (rootfs, small),
    }


def holds(found, committed):
    """Whether nothing seems to fall; half of what counts is chance."""
    return all(peer / ours >= committed.get(what, 0) * (1 - FALL / 2) for what, (peer, ours) in found.items())


def dehydrate(bench, committed):
    """Processor times to decompress all inputs, and of the program, for each profile."""
    floor = sum(map(median, all_in_turn(ROUNDS, [lambda a=a: Run(decompress(a.path)) for a in bench.artifacts])))
    found = {}
    for profile in bench.args.profile:
        runs = []
        for _ in range(ROUNDS):
            shutil.rmtree(bench.work / profile, ignore_errors=True)
            # Making published files again takes longer than all else, and is what tests do.
            runs.append(bench.dehydrate(profile, "--skip-published"))
            of = {f"dehydrate, {profile}: decompressing the inputs": (floor, median(runs))}
            if holds(of, committed):
                break
        found |= of
    return found


def rehydrate(bench, committed):
    """The processor times of disks to a pipe and of their peers."""
    disk = bench.disk("openstack")
    path = plain(disk, bench.work / "plain")
    peers = {"`xz -dc`": ["xz", "-dc", "-T1", disk.path], "`gzip -6` of as much": ["gzip", "-6", "-c", path]}
    whats = {}
    # Not the qcow2 of profile fast: it takes less than a tenth of a second, mostly that of starting.
    for profile, kind, label, peer in (("small", "qcow2", "openstack", "`xz -dc`"), ("fast", "raw", "hetzner", "`xz -dc`"),
                                       ("fast", "VMDK", "aws", "`gzip -6` of as much")):
        command = bench.rehydrator("rehydrate", "-", "--disk", label, "--data", bench.data(profile))
        if sha256sum(bench, command)[0] != bench.disk(label).sha256:
            raise Failed(f"{profile} {label}: other bytes than the stream metadata names")
        whats[f"rehydrate, {profile}, {kind}: {peer}"] = peer, command
    commands = {**peers, **{what: command for what, (_, command) in whats.items()}}
    runs = {what: [] for what in commands}
    for _ in range(ROUNDS):
        for of, more in zip(runs.values(), all_in_turn(RUNS, [lambda command=command: Run(command) for command in commands.values()])):
            of += more
        found = {what: (median(runs[peer]), median(runs[what])) for what, (peer, _) in whats.items()}
        if holds(found, committed):
            break
    path.unlink()
    return found


def instructions():
    """Those that the ratios depend on."""
    flags = set(re.search(r"(?:flags|Features)\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1].split())
    return " ".join([platform.machine(), *sorted(flags & {"avx2", "avx512f", "sha_ni", "sha2"})])
