"""An image of Debian 13 from a registry into a directory, against skopeo and umoci, and podman."""

import contextlib
import shutil
from typing import NamedTuple

from .release import CI, size_of
from .run import MIB, Run, in_turn, output, registry


class Cost(NamedTuple):
    seconds: float
    cpu: float
    rss: int


def pull(bench, report):
    report.say("## Pull an image into a directory\n")
    with debian(bench.work / "pull") as image:
        pulls(bench, report, bench.work / "pull", image)


@contextlib.contextmanager
def debian(work):
    """While a registry, in this directory, has an image of Debian 13 in three layers; its name."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    system = output(CI / "trixie")
    whats = {"a": ["usr/lib"], "b": ["usr/bin", "usr/share"],
             "c": ["--exclude=./usr/lib", "--exclude=./usr/bin", "--exclude=./usr/share", "."]}
    for name, what in whats.items():
        Run(["tar", "-C", system, "-cf", work / f"{name}.tar", *what])
    (work / "Containerfile").write_text("FROM scratch\n" + "".join(f"ADD {name}.tar /\n" for name in whats))
    buildah = ["buildah", "--storage-driver=vfs", "--root", work / "root", "--runroot", work / "run"]
    Run([*buildah, "bud", "--quiet", "--layers", "--tag", "bench", work])
    with registry(work / "registry") as host:
        image = f"{host}/bench"
        Run([*buildah, "push", "--quiet", "--tls-verify=false", "bench", f"docker://{image}"])
        yield image
    shutil.rmtree(work)


def pulls(bench, report, work, image):
    layout, cache = work / "layout", work / "cache"
    trees = []

    def tree():
        trees.append(work / f"tree{len(trees)}")
        return trees[-1]

    # No tree is removed before all is measured: ext4 passes over inodes that were freed in the last minutes one by one, at the
    # cost of who comes next.
    def theirs():
        shutil.rmtree(layout, ignore_errors=True)
        copy = Run(["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{image}", f"oci:{layout}:x"])
        unpack = Run(["umoci", "unpack", "--image", f"{layout}:x", tree()])
        return Cost(copy.seconds + unpack.seconds, copy.cpu + unpack.cpu, max(copy.rss, unpack.rss))

    # Podman keeps layers of its own in each store, and a tree is one of them over the others.
    def podman():
        store = tree()
        run = Run(["podman", "--root", store, "--runroot", f"{store}-run", "--storage-driver=overlay", "pull", "--quiet",
                   "--tls-verify=false", image])
        return Cost(run.seconds, run.cpu, run.rss)

    def ours(kept, cold=True):
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        run = Run(bench.rehydrator("pull", "--tls-verify=false", "--cache", kept, image, tree()))
        return Cost(run.seconds, run.cpu, run.rss)

    whats = {
        "`skopeo copy` and `umoci unpack`": theirs,
        "`podman pull` into a new store (overlay)": podman,
        "pull without a cache": lambda: ours("no"),
        "pull with an empty cache": lambda: ours(cache),
        "pull with all of it in the cache": lambda: ours(cache, cold=False),
    }
    runs = in_turn(bench.args.repeat, whats.values())
    rows = [[what, f"{run.seconds:.1f} s", f"{run.cpu:.1f} s", f"{run.rss / MIB:.0f} MiB", f"{runs[0].seconds / run.seconds:.2f}"]
            for what, run in zip(whats, runs)]
    Run(["chroot", trees[-1], "/bin/true"])
    unpacked = int(output("du", "-sb", trees[-1]).split()[0])
    report.say(f"Debian 13 in three layers, {size_of(layout / 'blobs'):,} bytes, gzip; {unpacked:,} bytes in files; from "
               f"docker-registry on this machine. `chroot DIR /bin/true` works on what was pulled.\n")
    report.table(["what", "time", "processor time", "peak memory (anonymous)", "times as fast"], rows)
