"""Published files: made again, against the tools that made them."""

import re
import shutil

from .run import MIB, Failed, Run


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
    index = bench.index("small")
    levels = dict(([""] + level.split("="))[-2:] for level in re.search(r" (\S+) \S+ \S+ \S+://", bench.options)[1].split(","))
    # As ci/stream/platforms.sh has them.
    tools = {".xz": ["xz", "-c{level}", "-T2"], ".tar.gz": ["gzip", "--no-name", "-9", "-c"], ".gz": ["gzip", "-6", "-c"], ".zip": ["zip", "-q", "-9j", "-"]}
    home, out = bench.work / "gnupg", bench.work / "published"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(mode=0o700)
    Run(["gpg", "--homedir", home, "--batch", "--quiet", "--import", bench.release / "signing-key.asc"])
    rows, side, whole, times, ratios = [], 0, 0, {}, {}
    for artifact in index["artifacts"]:
        published, platform, format_ = artifact["published"], artifact["platform"], artifact["format"]
        name, output = published["name"], artifact["output"]["name"]
        if artifact["tier"] != "published":
            raise Failed(f"{name}: {artifact['tier']}: {artifact.get('not-published')}")
        extra = artifact.get("published-map", {}).get("size", 0)
        side, whole = side + extra, whole + published["size"]
        if format_ in ("iso", "pxe"):
            continue
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        which = ["--disk", platform + ("4k" if format_.startswith("4k") else ""), "--data", bench.data("small")]
        run = Run(bench.rehydrator("rehydrate", "-", "--published", *which), keep=out / name)
        verify(home, out / name, next(f"{a.path}.sig" for a in bench.artifacts if a.path.name == name))
        tool = next((t for suffix, t in tools.items() if name.endswith(suffix) and name != output), None)
        made = ["", "", ""]
        if tool:
            level = levels.get(which[1], levels.get("", "0"))
            tool = [of.format(level=level) for of in tool]
            # Most disks of a format differ in a few bytes: the tool is asked for the first of them.
            kind = (*tool, format_, artifact["output"]["size"])
            if kind not in times:
                Run(bench.rehydrator("rehydrate", out, *which))
                times[kind] = Run([*tool, out / output], keep=out / "again").seconds
                # Other levels of xz are as fast as reading the disk, and no real release has them.
                if tool[0] != "xz" or level == "9":
                    ratios.setdefault(tool[0], []).append(run.seconds / times[kind])
            made = [" ".join(tool), f"{times[kind]:.1f} s", f"{run.seconds / times[kind]:.2f}"]
        row = [name, f"{published['size']:,}", f"{extra:,}"]
        if proofs:
            proof = proofs.get(f"{platform} {format_}" if platform == "metal" else platform)
            row.append(f"{proof} s" if proof else "")
        rows.append([*row, f"{run.seconds:.1f} s", f"{run.bytes / run.seconds / 1e6:.1f} MB/s", f"{run.first:.2f} s", f"{run.rss / MIB:.0f} MiB", *made])
    # The live system is stored as it was published.
    shutil.rmtree(out, ignore_errors=True)
    Run(bench.rehydrator("rehydrate", out, "--published", "--iso", "--pxe", "--data", bench.data("small")))
    for artifact in index["artifacts"]:
        if artifact["format"] in ("iso", "pxe"):
            path = out / artifact["published"]["name"]
            verify(home, path, f"{path}.sig")
    shutil.rmtree(out)
    report.table(["file", "bytes", "side data", *(["time of the proof"] if proofs else []), "time", "rate", "first byte",
                  "peak memory (anonymous)", "made with", "its time", "of that"], rows)
    report.say(f"`gpg --verify` of each: good. Side data of all: {side:,} bytes, {side / whole:.4%} of the published files. Of files of one format "
               f"and size, the tool made the first again. What has no tool beside it is compressed inside, by the tool that made the image.\n")
    report.promise("Side data, of the published files", side / whole, 0.01)
    for tool, of in ratios.items():
        report.promise(f"{tool}: the longest, of the time of the tool", max(of), 1.1)


def verify(home, path, signature):
    Run(["gpg", "--homedir", home, "--batch", "--quiet", "--verify", signature, path])
