"""Published files: made again, against the tools that made them."""

import re
import shutil
from pathlib import Path

from .run import MIB, Failed, Run


def as_published(bench, report):
    report.say("## Published files\n")
    index = bench.index("small")
    level = re.search(r" (\d) \S+ \S+ \S+://", bench.options)[1]
    tools = {".xz": ["xz", f"-c{level}", "-T2"], ".gz": ["gzip", "-6", "-c"], ".zip": ["zip", "-q", "-9j", "-"]}
    home, out = bench.work / "gnupg", bench.work / "published"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(mode=0o700)
    Run(["gpg", "--homedir", home, "--batch", "--quiet", "--import", bench.release / "signing-key.asc"])
    rows, side, whole = [], 0, 0
    for artifact in index["artifacts"]:
        name, output = artifact["published"]["name"], artifact["output"]["name"]
        if artifact["tier"] != "published":
            raise Failed(f"{name}: {artifact['tier']}: {artifact.get('not-published')}")
        extra = artifact.get("published-map", {}).get("size", 0)
        side, whole = side + extra, whole + artifact["published"]["size"]
        if name == output:
            continue
        shutil.rmtree(out, ignore_errors=True)
        label = artifact["platform"] + ("4k" if artifact["format"].startswith("4k") else "")
        which = ["--disk", label, "--data", bench.data("small")]
        run = Run(bench.rehydrator("rehydrate", out, "--published", *which))
        Run(["gpg", "--homedir", home, "--batch", "--quiet", "--verify", out / f"{name}.sig", out / name])
        Run(bench.rehydrator("rehydrate", out, *which))
        suffix = Path(name).suffix
        tool = Run([*tools[suffix], out / output], keep=out / "again")
        rows.append([name, f"{artifact['published']['size']:,}", f"{extra:,}", f"{run.seconds:.1f} s", f"{run.rss / MIB:.0f} MiB",
                     " ".join(tools[suffix]), f"{tool.seconds:.1f} s", f"{run.seconds / tool.seconds:.2f}"])
    shutil.rmtree(out, ignore_errors=True)
    report.table(["file", "bytes", "side data", "time", "peak memory (anonymous)", "made with", "its time", "of that"], rows)
    report.say(f"`gpg --verify` of each: good. Side data of all: {side:,} bytes, {side / whole:.2%} of the published files.\n")
