"""Published files: made again, against the tools that made them."""

import re
import shutil

from .run import MIB, Failed, Run

# As ci/stream/platforms.sh has them.
TOOLS = {".xz": ["xz", "-c{level}", "-T2"], ".tar.gz": ["gzip", "--no-name", "-9", "-c"], ".gz": ["gzip", "-6", "-c"], ".zip": ["zip", "-q", "-9j", "-"]}
COST = ["time", "rate", "first byte", "peak memory (anonymous)"]


def as_published(bench, report):
    report.say("## Published files\n")
    # What other parts left may be without these proofs.
    if bench.data("small").exists() and any("not-published" in artifact for artifact in bench.index("small")["artifacts"]):
        shutil.rmtree(bench.work / "small")
    proofs = {}
    if run := bench.dehydrate("small"):
        proofs = dict(re.findall(r"^(.*): prove as published: done, .* in ([\d.]+) s$", (bench.work / "small/said").read_text(), re.M))
        report.say(f"Dehydrating takes {run.seconds:.0f} s, {run.cpu:.0f} s of processor time, and {run.rss / MIB:.0f} MiB of memory (anonymous) "
                   f"when every published file is proven as well.\n")
    home = bench.work / "gnupg"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(mode=0o700)
    Run(["gpg", "--homedir", home, "--batch", "--quiet", "--import", bench.release / "signing-key.asc"])
    runs = small(bench, report, home, proofs)
    fast(bench, report, home, runs)


def small(bench, report, home, proofs):
    """Every published file by the profile small; gives back the run of each, by name."""
    levels = dict(([""] + level.split("="))[-2:] for level in re.search(r" (\S+) \S+ \S+ \S+://", bench.options)[1].split(","))
    rows, side, whole, runs, times, ratios = [], 0, 0, {}, {}, {}
    for artifact in bench.index("small")["artifacts"]:
        published, platform, format_ = artifact["published"], artifact["platform"], artifact["format"]
        name, output = published["name"], artifact["output"]["name"]
        if artifact["tier"] != "published":
            raise Failed(f"{name}: {artifact['tier']}: {artifact.get('not-published')}")
        extra = artifact.get("published-map", {}).get("size", 0)
        side, whole = side + extra, whole + published["size"]
        if format_ in ("iso", "pxe"):
            continue
        run = runs[name] = make(bench, "small", artifact, home)
        tool = next((t for suffix, t in TOOLS.items() if name.endswith(suffix) and name != output), None)
        again = ["", "", ""]
        if tool:
            which = disk(bench, "small", artifact)
            level = levels.get(which[1], levels.get("", "0"))
            tool = [of.format(level=level) for of in tool]
            # Most disks of a format differ in a few bytes: the tool is asked for the first of them.
            kind = (*tool, format_, artifact["output"]["size"])
            if kind not in times:
                out = empty(bench)
                Run(bench.rehydrator("rehydrate", out, *which))
                times[kind] = Run([*tool, out / output], keep=out / "again").seconds
                # Other levels of xz are as fast as reading the disk, and no real release has them.
                if tool[0] != "xz" or level == "9":
                    ratios.setdefault(tool[0], []).append(run.seconds / times[kind])
            again = [" ".join(tool), f"{times[kind]:.1f} s", f"{run.seconds / times[kind]:.2f}"]
        row = [name, f"{published['size']:,}", f"{extra:,}"]
        if proofs:
            proof = proofs.get(f"{platform} {format_}" if platform == "metal" else platform)
            row.append(f"{proof} s" if proof else "")
        rows.append([*row, *cost(run), *again])
    # The live system is stored as it was published.
    out = empty(bench)
    Run(bench.rehydrator("rehydrate", out, "--published", "--iso", "--pxe", "--data", bench.data("small")))
    for artifact in bench.index("small")["artifacts"]:
        if artifact["format"] in ("iso", "pxe"):
            verify(bench, home, out / artifact["published"]["name"])
    shutil.rmtree(out)
    report.table(["file", "bytes", "side data", *(["time of the proof"] if proofs else []), *COST, "made with", "its time", "of that"], rows)
    report.say(f"`gpg --verify` of each: good. Each was made once. Side data of all: {side:,} bytes, {side / whole:.4%} of the published files. Of files of one format "
               f"and size, the tool made the first again. What has no tool beside it is compressed inside, by the tool that made the image.\n")
    report.promise("Side data, of the published files", side / whole, 0.01)
    for tool, of in ratios.items():
        report.promise(f"{tool}: the longest, of the time of the tool", max(of), 1.1)
    return runs


def fast(bench, report, home, runs):
    """One file of each compressor by the profile fast, beside the runs by the other profile."""
    of_few = bench.of(bench.release, bench.work / "published-fast")
    # The base, which is by xz, and the first by gzip and by zip.
    first = [next((a for a in bench.artifacts if re.search(end, a.path.name)), None) for end in (r"(?<!\.tar)\.gz$", r"\.zip$")]
    few = [bench.disk("qemu", "openstack", "metal"), *first]
    of_few.artifacts = [a for a in bench.artifacts if a.file == "rootfs" or a in few]
    shutil.rmtree(of_few.work)
    of_few.dehydrate("fast", "--allow-unhandled")
    rows = []
    for artifact in of_few.index("fast")["artifacts"]:
        name = artifact["published"]["name"]
        if name in runs:
            run = make(of_few, "fast", artifact, home)
            rows.append([name, *cost(run), f"{runs[name].seconds:.1f} s", f"{run.seconds / runs[name].seconds:.2f}"])
    shutil.rmtree(of_few.work)
    report.say("### Profile fast\n")
    report.table(["file", *COST, "by profile small", "of that"], rows)


def disk(bench, profile, artifact):
    """The options that ask for this disk."""
    return ["--disk", artifact["platform"] + ("4k" if artifact["format"].startswith("4k") else ""), "--data", bench.data(profile)]


def make(bench, profile, artifact, home):
    """Makes one file as it was published, and has its signature verified."""
    path = empty(bench) / artifact["published"]["name"]
    run = Run(bench.rehydrator("rehydrate", "-", "--published", *disk(bench, profile, artifact)), keep=path)
    verify(bench, home, path)
    return run


def cost(run):
    """The columns COST."""
    return f"{run.seconds:.1f} s", f"{run.bytes / run.seconds / 1e6:.1f} MB/s", f"{run.first:.2f} s", f"{run.rss / MIB:.0f} MiB"


def empty(bench):
    """The directory in which files are made, with nothing in it."""
    out = bench.work / "published"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out


def verify(bench, home, path):
    """By the signature that was published."""
    signature = next(f"{a.path}.sig" for a in bench.artifacts if a.path.name == path.name)
    Run(["gpg", "--homedir", home, "--batch", "--quiet", "--verify", signature, path])
