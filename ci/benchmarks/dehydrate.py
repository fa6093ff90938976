"""From the release to the image: time, memory, and what comes of it."""

from .release import decompress, size_of
from .run import MIB, Run


def dehydrate(bench, report):
    report.say("## Dehydrate\n")
    floor = sum(Run(decompress(a.path)).cpu for a in bench.artifacts)
    rows, ratios = [], {}
    for profile in bench.args.profile:
        if run := bench.dehydrate(profile, "--skip-published"):
            ratios[profile] = run.cpu / floor
            rows.append([profile, f"{run.seconds:.0f} s", f"{run.cpu:.0f} s", f"{ratios[profile]:.2f}", f"{run.rss / MIB:.0f} MiB"])
    report.say(f"Decompressing every input with its own tool takes {floor:.0f} s of processor time: the floor. Every artifact is proven to come back, "
               f"plain; how published files are made again is not looked at (`--skip-published`), as that takes compressing each of them: see there.\n")
    report.table(["profile", "time", "processor time", "of the floor", "peak memory (anonymous)"], rows)
    for profile, ratio in ratios.items():
        report.promise(f"Dehydrate, {profile}: processor time, of that of decompressing the inputs", ratio, 3)


def sizes(bench, report):
    report.say("## Size\n")
    rootfs = next(a for a in bench.artifacts if a.file == "rootfs").path.stat().st_size
    rows = [["published", f"{bench.published:,}", "", ""], ["live rootfs", f"{rootfs:,}", f"{rootfs / bench.published:.2%}", "1"]]
    for profile in bench.args.profile:
        for what, size in [("dehydrated directory", size_of(bench.data(profile))), ("image", size_of(bench.image(profile)))]:
            rows.append([f"{profile}: {what}", f"{size:,}", f"{size / bench.published:.2%}", f"{size / rootfs:.3f}"])
    report.table(["what", "bytes", "of the published files", "of the live rootfs"], rows)
    if "small" in bench.args.profile:
        most = 1.05 * rootfs + 4e6
        report.promise("The image of profile small, of 1.05 times the live rootfs and 4 MB", size_of(bench.work / "small/image") / most, 1)
