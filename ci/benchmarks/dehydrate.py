"""From the release to the image: time, memory, and what comes of it."""

from .release import decompress, size_of
from .run import MIB, Run


def dehydrate(bench, report):
    report.say("## Dehydrate\n")
    floor = sum(Run(decompress(a.path)).cpu for a in bench.artifacts)
    rows = []
    for profile in bench.args.profile:
        if run := bench.dehydrate(profile):
            rows.append([profile, f"{run.seconds:.0f} s", f"{run.cpu:.0f} s", f"{run.cpu / floor:.1f}", f"{run.rss / MIB:.0f} MiB"])
    report.say(f"Decompressing every input with its own tool takes {floor:.0f} s of processor time: the floor.\n")
    report.table(["profile", "time", "processor time", "of the floor", "peak memory (anonymous)"], rows)


def sizes(bench, report):
    report.say("## Size\n")
    rootfs = next(a for a in bench.artifacts if a.file == "rootfs").path.stat().st_size
    rows = [["published", f"{bench.published:,}", "", ""], ["live rootfs", f"{rootfs:,}", f"{rootfs / bench.published:.2%}", "1"]]
    for profile in bench.args.profile:
        for what, size in [("dehydrated directory", size_of(bench.data(profile))), ("image", size_of(bench.image(profile)))]:
            rows.append([f"{profile}: {what}", f"{size:,}", f"{size / bench.published:.2%}", f"{size / rootfs:.3f}"])
    report.table(["what", "bytes", "of the published files", "of the live rootfs"], rows)
