"""Where the time goes, by perf: the functions in which the program is found most often."""

import re
import shutil

from .pull import debian
from .release import CI
from .run import Run, output
from .serve import Rehydrator, fetch

LEAST = 2  # per cent


def profile(bench, report):
    report.say("## Where the time goes\n")
    Run([CI / "deps", "--check", "bench"])
    work = bench.work / "profile"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    # The same program with the names of its functions.
    bench = bench.of(bench.release, bench.work)
    bench.program = output(CI / "build", "symbols")
    data = work / "perf.data"
    record = ["perf", "record", "--quiet", "--freq=199", "--output", data, "--"]

    def look(what, measure):
        bench.before = record
        measure()
        found = output("perf", "report", "--stdio", "--quiet", "--no-children", "--fields=overhead,symbol", f"--percent-limit={LEAST}",
                       "--input", data)
        report.say(f"### {what}\n")
        rows = [re.fullmatch(r"\s*([\d.]+%)\s+\[(.)\] (.*?)(?:::h[0-9a-f]{16})?\s*", line) for line in found.splitlines()]
        report.table(["function", "of the samples"], [
            [f"`{row[3]}`" + (" (kernel)" if row[2] == "k" else ""), row[1]] for row in rows if row])

    def rehydrate(profile, *options):
        Run(bench.rehydrator("rehydrate", "-", *options, "--data", bench.data(profile)))

    for name in bench.args.profile:
        for kind, label in {"qcow2": "openstack", "VMDK": "aws"}.items():
            look(f"Rehydrate, {name}, {kind}", lambda name=name, label=label: rehydrate(name, "--disk", label))
    if bench.index("small")["artifacts"][0]["tier"] == "published":
        xz = bench.disk("qemu", "openstack")
        look(f"Rehydrate, small, {xz.path.name}", lambda: rehydrate("small", "--disk", xz.label, "--published"))
    fresh = bench.of(bench.release, work)
    fresh.program, fresh.before = bench.program, record
    look("Dehydrate, small", lambda: fresh.dehydrate("small", "--skip-published"))
    with debian(work / "pull") as image:
        look("Pull", lambda: Run(bench.rehydrator("pull", "--tls-verify=false", "--cache=no", image, work / "tree")))
    look("Serve the ISO", lambda: iso(bench, work))
    shutil.rmtree(work)
    report.say(f"`{' '.join(map(str, record[:4]))}`, {output('perf', '--version')}; functions with at least {LEAST} % of the samples.\n")


def iso(bench, work):
    """A hundred of the ISO to eight clients."""
    with Rehydrator(bench, work) as server:
        path = next(a.path for a in bench.artifacts if a.format == "iso")
        fetch(server.of(bench, path), 100, 8, path.stat().st_size)
