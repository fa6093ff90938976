"""How time, memory and size grow with disks, content, platforms and processors, on small releases made for it."""

import os
import shutil
import subprocess
from typing import Callable, NamedTuple

from .release import CI, size_of
from .run import MIB, Failed, Run, in_turn

# Of each kind of disk one: qcow2, VMDK, VMDK in an OVA, raw.
FEW = "live,openstack,aws,vmware,hetzner"
DISKS = {"qcow2": "openstack", "VMDK": "aws", "raw": "hetzner"}
# In this order as many as are asked for, and "live": the first is the base.
ALL = ("qemu openstack aws hetzner vmware azure gcp hyperv nutanix kubevirt metal metal4k aliyun applehv azurestack digitalocean exoscale "
       "ibmcloud oraclecloud proxmoxve virtualbox vultr").split()
GIB = 1 << 30

# The points: virtual GB, times the content asked for, platforms; and between which disks zeros are counted.
SIZES, TIMES, COUNTS, ZEROS = (1, 2, 4, 8, 16), (4, 8, 16, 32), (1, 5, 10, len(ALL)), (2, 16)


class Series(NamedTuple):
    """One axis: its points, and the release of each."""

    name: str
    unit: str  # none where the name says it
    points: list  # numbers
    options: Callable  # of a point, for ci/make-stream


def disk_size(bench, report):
    content = bench.args.growth
    axis = Series("disk size", "GB", SIZES, lambda n: (content, f"{n}G", FEW))
    zeros(bench, report, grow(bench, report, axis, f"{content} MB of content"))


def content(bench, report):
    points = [bench.args.growth * n for n in TIMES]
    axis = Series("content", "MB", points, lambda n: (n, f"{max(4, n >> 8)}G", FEW))
    grow(bench, report, axis, "disks of 4 GB, or of four times the content")


def platforms(bench, report):
    content = bench.args.growth
    axis = Series("platforms", "", COUNTS, lambda n: (content, "1G", ",".join(["live", *ALL[:n]])))
    grow(bench, report, axis, f"{content} MB of content on disks of 1 GB")


def grow(bench, report, axis, of):
    """Measures each point of an axis, on releases of such a kind, and gives all back."""
    report.say(f"## Growth by {axis.name}\n")
    report.say(f"Releases with {of}; `ci/make-stream --xz-level 0`; profile small, without the proof of published files. The slope is that of the line "
               f"through the points by least squares.\n")
    points = {n: measure(release(bench, *axis.options(n)), axis.name) for n in axis.points}
    grown(report, axis, points)
    return points


def release(bench, content, disk, platforms):
    """A release, made once; the same content and machinery for all of them."""
    count = platforms.count(",")
    path = bench.work / "growth" / f"{content}M-{disk}-{count}"
    path.parent.mkdir(exist_ok=True)
    made = subprocess.run([CI / "make-stream", "--content-size", str(content), "--disk-size", disk, "--platforms", platforms, "--xz-level", "0", path],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode:
        raise Failed(made.stdout)
    return bench.of(path, path.with_name(f"{path.name}-work"))


def measure(small, axis):
    """The cost of one release: "what" to a number and its unit."""
    shutil.rmtree(small.work)
    dehydrated = small.dehydrate("small", "--skip-published")
    found = {
        "dehydrate, time": (dehydrated.seconds, "s"),
        "dehydrate, processor time": (dehydrated.cpu, "s"),
        "dehydrate, peak memory": (dehydrated.rss / MIB, "MiB"),
        "image": (size_of(small.image("small")) / 1e6, "MB"),
    }
    disks = DISKS if axis != "platforms" else {}
    runs = in_turn(small.args.repeat, [lambda label=label: disk(small, "small", label) for label in disks.values()])
    for format_, run in zip(disks, runs):
        found[f"rehydrate, {format_}, time"] = (run.seconds, "s")
        found[f"rehydrate, {format_}, peak memory"] = (run.rss / MIB, "MiB")
    if axis == "platforms":
        run = directory(small, "small")
        found["rehydrate, all, time"] = (run.seconds, "s")
        found["rehydrate, all, peak memory"] = (run.rss / MIB, "MiB")
    shutil.rmtree(small.work)
    return found


def disk(small, profile, label):
    return Run(small.rehydrator("rehydrate", "-", "--disk", label, "--data", small.data(profile)))


def directory(small, profile):
    """Everything into a directory."""
    out = small.work / "out"
    run = Run(small.rehydrator("rehydrate", out, "--all", "--data", small.data(profile)))
    shutil.rmtree(out)
    return run


def slope(points):
    n, xs, ys = len(points), [x for x, _ in points], [y for _, y in points]
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x in xs)


def grown(report, axis, points):
    rows = []
    for what, (_, unit) in points[axis.points[0]].items():
        line = [(n, points[n][what][0]) for n in axis.points]
        rows.append([what, *(f"{y:.4g} {unit}" for _, y in line), f"{slope(line):.3g} {unit}"])
    report.table([axis.name, *(f"{n} {axis.unit}".strip() for n in axis.points), f"slope, for each {axis.unit}".strip()], rows)
    for what in ("dehydrate, time", "rehydrate, qcow2, time", "rehydrate, raw, time"):
        if what in points[axis.points[0]]:
            report.bars(f"{what} in seconds, by {axis.name}", [
                [f"{n} {axis.unit}".strip(), points[n][what][0], f"{points[n][what][0]:.2f}", True] for n in axis.points])


def zeros(bench, report, points):
    """What zeros cost: all that a disk of 16 GB has more than one of 2 GB."""
    few, many = ZEROS
    added = (many - few) * GIB
    write, sha = in_turn(bench.args.repeat, [lambda: Run(["head", "-c", added, "/dev/zero"]),
                                             lambda: Run(["sh", "-c", f"head -c {added} /dev/zero | sha256sum"])])
    report.say(f"From {few} to {many} GB of virtual size, zeros all of it; `head -c {added} /dev/zero` takes {write.seconds:.2f} s, and into `sha256sum` "
               f"{sha.seconds:.2f} s.\n")
    rows, times = [], {}
    for format_ in DISKS:
        before, after = times[format_] = [p[f"rehydrate, {format_}, time"][0] for p in (points[few], points[many])]
        rows.append([format_, f"{before:.2f} s", f"{after:.2f} s", f"{after / before - 1:+.1%}", f"{(after - before) / sha.seconds:.2f}"])
    report.table(["rehydrate", f"{few} GB", f"{many} GB", "more", "of hashing those zeros"], rows)
    for format_, (before, after) in times.items():
        if format_ == "raw":
            report.promise("raw: the more, of hashing those zeros", (after - before) / sha.seconds, 1)
        else:
            report.promise(f"{format_}: time with {many} GB, of that with {few} GB", after / before, 1.1)


def processors(bench, report):
    """The same on one processor and on two."""
    report.say("## Growth by processors\n")
    content = bench.args.growth
    small = release(bench, content, "4G", FEW)
    counts = (1, 2)
    if len(os.sched_getaffinity(0)) < 2:
        raise Failed("growth: wants two processors")
    rows = {}

    def on(count, measure):
        small.before = ["taskset", "--cpu-list", ",".join(map(str, sorted(os.sched_getaffinity(0))[:count]))]
        return measure()

    def compare(what, measure, repeat=small.args.repeat):
        rows[what] = in_turn(repeat, [lambda count=count: on(count, measure) for count in counts])

    def dehydrate(profile):
        shutil.rmtree(small.work / profile, ignore_errors=True)
        return small.dehydrate(profile, "--skip-published")

    for profile in ("small", "fast"):
        compare(f"dehydrate, {profile}", lambda: dehydrate(profile), 1)
        for what, label in DISKS.items():
            compare(f"rehydrate, {profile}, {what}", lambda: disk(small, profile, label))
        compare(f"rehydrate, {profile}, all into a directory", lambda: directory(small, profile), 1)
    shutil.rmtree(small.work)
    report.say(f"A release with {content} MB of content on disks of 4 GB, by `taskset`.\n")
    report.table(["what", *(f"{n} processor{'s' * (n > 1)}" for n in counts), "times as fast"], [
        [what, *(f"{run.seconds:.2f} s" for run in runs), f"{runs[0].seconds / runs[1].seconds:.2f}"] for what, runs in rows.items()])
