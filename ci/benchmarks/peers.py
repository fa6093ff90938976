"""The whole release by other means: archives, repositories and deltas, their size and time; and one disk back out of each.

Only one plain file is there at a time, besides the base disk, as those of a real release take 200 GB.
"""

import math
import os
import shutil
import subprocess
import time

from .rehydrate import LOG, sha256sum
from .release import CI, decompress, size_of
from .run import MIB, Failed, Run, anonymous, best, in_turn

ZSTD = ["zstd", "-q", "-f", "-19", "--long=31"]


class Bases:
    """What deltas refer to: the live rootfs for the live system, else a plain disk, the one that the program has as well."""

    def __init__(self, bench, work):
        self.disk = bench.disk("qemu", "openstack", "metal")
        self.live = next(a for a in bench.artifacts if a.file == "rootfs")
        self.path = work / "base"
        plain(self.disk, self.path)
        self.packed = work / "base.zst"
        self.packing = Run([*ZSTD, self.path, "-o", self.packed])

    def of(self, artifact):
        return self.live.path if artifact.format in ("iso", "pxe") else self.path

    def stored(self, artifact):
        """The size of a base itself in what is kept."""
        return {self.disk: self.packed, self.live: self.live.path}.get(artifact)


def plain(artifact, path):
    """The plain file, with holes where it has zeros; the published one where that is plain."""
    command = decompress(artifact.path)
    if command[0] == "cat":
        return artifact.path
    reader = subprocess.Popen(command, stdout=subprocess.PIPE)
    subprocess.run(["cp", "--sparse=always", "/dev/stdin", path], stdin=reader.stdout, check=True)
    reader.stdout.close()
    if reader.wait():
        raise Failed(f"{command}: exit status {reader.returncode}")
    return path


class Peer:
    """Takes one plain file after the other; begins with no more of them when it has taken `most` seconds."""

    most = math.inf

    def __init__(self, work):
        self.work = work / "".join(c for c in self.name if c.isalnum())
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.seconds = self.cpu = self.rss = 0
        self.sizes, self.failed = {}, {}

    def run(self, *command, **how):
        run = Run(command, **how)
        self.count(run)
        return run

    def count(self, run):
        self.seconds += run.seconds
        self.cpu += run.cpu
        self.rss = max(self.rss, run.rss)

    def add(self, artifact, path):
        if self.seconds > self.most:
            return
        before = size_of(self.work)
        try:
            self.take(artifact, path)
        except Failed as failed:
            self.failed[artifact] = str(failed)
            return
        self.sizes[artifact] = size_of(self.work) - before

    def end(self):
        pass


class Together(Peer):
    name = "tar and zstd together"
    commands = ["tar --sparse -c FILE… | zstd -19 --long=31"]

    def __init__(self, work):
        super().__init__(work)
        self.zstd = subprocess.Popen([*ZSTD, "-o", self.work / "all"], stdin=subprocess.PIPE)

    def take(self, artifact, path):
        start = time.monotonic()
        # What tar has written, zstd has read, up to what a pipe holds.
        subprocess.run(["tar", "--sparse", "-c", "-f", "-", "-C", path.parent, path.name], stdout=self.zstd.stdin, check=True)
        self.seconds += time.monotonic() - start
        self.rss = max(self.rss, anonymous(self.zstd.pid))

    def end(self):
        start = time.monotonic()
        self.zstd.stdin.close()
        _, status, usage = os.wait4(self.zstd.pid, 0)
        self.zstd.returncode = status
        if status:
            raise Failed(f"zstd: exit status {status}")
        self.seconds += time.monotonic() - start
        self.cpu = usage.ru_utime + usage.ru_stime
        # What it has written at the end of a file says little of that file.
        self.total = size_of(self.work)


class Casync(Peer):
    name = "casync store"
    commands = ["casync make --store=STORE FILE.caibx FILE", "casync extract --store=STORE FILE.caibx OUT"]

    def take(self, artifact, path):
        self.run("casync", "make", f"--store={self.work}/store.castr", self.work / f"{artifact.path.name}.caibx", path)

    def back(self, artifact, out):
        return ["casync", "extract", f"--store={self.work}/store.castr", self.work / f"{artifact.path.name}.caibx", out]


class Borg(Peer):
    name = "borg repository"
    commands = ["borg init --encryption=none REPO", "borg create --compression zstd,19 REPO::NAME FILE", "borg extract --stdout REPO::NAME"]

    def __init__(self, work):
        super().__init__(work)
        self.repo = self.work / "repo"
        # Not in the home directory: nor its cache, which is no part of what is kept.
        self.env = {"BORG_BASE_DIR": str(work / "borg-home"), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
                    "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}
        shutil.rmtree(work / "borg-home", ignore_errors=True)
        self.run("borg", "init", "--encryption=none", self.repo, env=self.env)

    def take(self, artifact, path):
        self.run("borg", "create", "--compression", "zstd,19", f"{self.repo}::{artifact.path.name}", path, env=self.env)

    def back(self, artifact):
        return ["borg", "extract", "--stdout", f"{self.repo}::{artifact.path.name}"]


class Deltas(Peer):
    """Each file as a delta of its own over its base, which is kept as well."""

    def __init__(self, work, bases, target):
        super().__init__(work)
        self.bases, self.target = bases, target
        self.count(bases.packing)

    def add(self, artifact, path):
        if stored := self.bases.stored(artifact):
            self.sizes[artifact] = stored.stat().st_size
            return
        super().add(artifact, path)
        for delta in self.work.glob("delta*"):
            delta.unlink()

    def take(self, artifact, path):
        self.delta(self.bases.of(artifact), path, self.work / ("kept" if artifact == self.target else "delta"))

    def packed(self, path):
        """As these formats do not compress, or little."""
        self.run(*ZSTD, "--rm", path, "-o", f"{path}.zst")


class Xdelta(Deltas):
    name = "xdelta3 -9"
    commands = ["xdelta3 -9 -B 1073741824 -e -s BASE FILE DELTA", "xdelta3 -d -c -B 1073741824 -s BASE DELTA"]

    def delta(self, base, path, delta):
        self.run("xdelta3", "-9", "-f", "-B", 1 << 30, "-e", "-s", base, path, delta)

    def back(self, artifact):
        return ["xdelta3", "-d", "-c", "-B", 1 << 30, "-s", self.bases.of(artifact), self.work / "kept"]


class PatchFrom(Deltas):
    name = "zstd --patch-from"
    commands = ["zstd -19 --long=31 --patch-from=BASE FILE", "zstd -dc --long=31 --patch-from=BASE DELTA"]

    def delta(self, base, path, delta):
        self.run(*ZSTD, f"--patch-from={base}", path, "-o", delta)

    def back(self, artifact):
        return ["zstd", "-q", "-dc", "--long=31", f"--patch-from={self.bases.of(artifact)}", self.work / "kept"]


class Rdiff(Deltas):
    name = "rdiff and zstd"
    commands = ["rdiff -b 4096 signature BASE SIGNATURE", "rdiff delta SIGNATURE FILE DELTA; zstd -19 --long=31 DELTA", "rdiff patch BASE DELTA"]

    def __init__(self, work, bases, target):
        super().__init__(work, bases, target)
        self.signatures = work / "signatures"
        self.signatures.mkdir(exist_ok=True)

    def delta(self, base, path, delta):
        signature = self.signatures / base.name
        if not signature.exists():
            self.run("rdiff", "-b", 4096, "signature", base, signature)
        self.run("rdiff", "delta", signature, path, delta)
        self.packed(delta)

    def back(self, artifact):
        Run(["zstd", "-q", "-f", "-d", "--long=31", self.work / "kept.zst"])
        return ["rdiff", "patch", self.bases.of(artifact), self.work / "kept"]


class Rsync(Deltas):
    name = "rsync batch and zstd"
    commands = ["rsync --no-whole-file --ignore-times --block-size=4096 --only-write-batch=DELTA FILE DIR/FILE; zstd -19 --long=31 DELTA"]

    def delta(self, base, path, delta):
        there = self.work / "there"
        there.mkdir()
        try:
            # Linked over devices there is no such thing: the base of the live system is copied then.
            os.link(base, there / path.name)
        except OSError:
            shutil.copyfile(base, there / path.name)
        self.run("rsync", "--no-whole-file", "--ignore-times", "--block-size=4096", f"--only-write-batch={delta}", path, there)
        shutil.rmtree(there)
        delta.with_suffix(".sh").unlink()
        self.packed(delta)


def peers(bench, report):
    Run([CI / "deps", "--check", "bench"])
    work = bench.work / "peers"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    bases = Bases(bench, work)
    order = sorted((a for a in bench.artifacts if a not in (bases.disk, bases.live)), key=lambda a: a.format)
    # Another disk, of the kind that most are.
    target = next((a for a in order if a.is_disk and "qcow2.xz" in a.format), None)
    if not target:
        raise Failed("peers: wants a second disk that is published as qcow2.xz")
    # What others look like is taken by all; without it the size of a part would say nothing.
    first = [bases.disk, bases.live, target]
    order = [*first, *(a for a in order if a != target)]
    others = [Together(work), Casync(work), Borg(work), *(kind(work, bases, target) for kind in (Xdelta, PatchFrom, Rdiff, Rsync))]
    for artifact in order:
        path = bases.path if artifact == bases.disk else plain(artifact, work / "plain")
        for peer in others:
            peer.add(artifact, path)
            if artifact == first[-1]:
                peer.most = peer.seconds + bench.args.bound
        (work / "plain").unlink(missing_ok=True)
    for peer in others:
        peer.end()
    tables(bench, report, bases, others, order)
    back(bench, report, bases, target, {type(peer): peer for peer in others})
    shutil.rmtree(work)


def tables(bench, report, bases, others, order):
    report.say("## Size, against others\n")
    index = bench.index("small")
    image = size_of(bench.image("small"))
    stored = {a["published"]["name"]: a["stored"] for a in index["artifacts"]}

    def row(what, size, files, *cost, least=""):
        """What the program stores for the same files is its dehydrated directory, small, less the metadata."""
        ours = sum(stored[a.path.name] for a in files)
        return [what, f"{least}{size:,}", f"{least}{size / bench.published:.2%}", f"{size / ours:.2f}", *(cost or [""] * 3), len(files)]

    def took(cost):
        return f"{cost.seconds:.0f} s", f"{cost.cpu:.0f} s", f"{cost.rss / MIB:.0f} MiB"

    rows = [row("published", bench.published, order), row("image, small", image, order, *took(bench.cost("small")))]
    bars = [["published", bench.published], ["image, small", image]]
    if bench.data("fast").exists():
        fast = size_of(bench.image("fast"))
        rows.append(row("image, fast", fast, order, *took(bench.cost("fast"))))
        bars.append(["image, fast", fast])
    for peer in others:
        size, done = getattr(peer, "total", sum(peer.sizes.values())), len(peer.sizes)
        most = "" if done == len(order) else "≥ "
        rows.append(row(peer.name, size, peer.sizes, *took(peer), least=most))
        bars.append([peer.name + (f", {done} of {len(order)} files" if most else ""), size])
    report.table(["what", "bytes", "of the published files", "times what the program stores for the same files", "time", "processor time",
                  "peak memory (anonymous)", "files"], rows)
    for peer in others:
        ours = sum(stored[a.path.name] for a in peer.sizes)
        report.promise(f"What the program stores, of {peer.name}, for the same files", ours / getattr(peer, "total", sum(peer.sizes.values())), 1)
    report.bars("Size of the whole release, in MB", [[label, size, f"{size / 1e6:.0f}", label.startswith("image")] for label, size in bars])
    report.say(f"Of all plain files together, the base first ({bases.disk.path.name}); deltas are over that disk, those of the live system "
               f"over the live rootfs, and both bases are counted, the disk as `zstd -19 --long=31`. Each takes the first three files, and begins "
               f"with no other {bench.args.bound} s after them: what is missing then makes its size a lower bound (≥). The "
               f"times of the images are those of dehydrating, with each file proven plain.\n")
    for peer in others:
        for artifact, said in peer.failed.items():
            report.say(f"{peer.name} failed with {artifact.path.name}: {said.splitlines()[-1]}\n")
    report.commands(command for peer in others for command in peer.commands)
    each = [peer for peer in others if not hasattr(peer, "total")]
    report.say("What each file adds, in bytes:\n")
    report.table(["file", "published", "image, small", *(peer.name for peer in each)], [
        [a.path.name, f"{a.path.stat().st_size:,}", f"{stored[a.path.name]:,}", *(f"{p.sizes[a]:,}" if a in p.sizes else "–" for p in each)]
        for a in order])


def back(bench, report, bases, target, others):
    """One disk out of each, in turn, every one checked."""
    out = bench.work / "peers/out"

    def ours(profile):
        return bench.rehydrator("rehydrate", "-", "--disk", target.label, "--data", bench.data(profile))

    whats = {f"rehydrate, {profile}": (ours(profile), LOG) for profile in bench.args.profile if bench.data(profile).exists()}
    whats["xz -dc -T1, as published"] = (["xz", "-dc", "-T1", target.path], {})
    for kind, name in {Xdelta: "xdelta3 -d", PatchFrom: "zstd -d --patch-from", Rdiff: "rdiff patch", Borg: "borg extract"}.items():
        if target in others[kind].sizes:
            whats[name] = (others[kind].back(target), getattr(others[kind], "env", {}))
    for name, (command, env) in whats.items():
        if sha256sum(bench, command, env)[0] != target.sha256:
            raise Failed(f"{name}: other bytes than the stream metadata names")
    whats["zstd -dc, the base"] = (["zstd", "-q", "-dc", "--long=31", bases.packed], {})
    measures = [lambda what=what: Run(what[0], env=what[1]) for what in whats.values()]
    if target in others[Casync].sizes:
        whats["casync extract, to a file"] = None

        def casync():
            out.unlink(missing_ok=True)
            return Run(others[Casync].back(target, out))
        measures.append(casync)
    plain(target, bases.path.with_name("plain"))
    whats["sha256sum, from a file"] = None
    measures.append(lambda: Run(["sha256sum", bases.path.with_name("plain")]))
    runs = dict(zip(whats, in_turn(bench.args.repeat, measures)))
    if out.exists() and best(1, ["sha256sum", out]).out[:64].decode() != target.sha256:
        raise Failed("casync extract: other bytes than the stream metadata names")

    decode = decode_rootfs(bench, bases)
    size = bases.path.with_name("plain").stat().st_size
    floor = max(runs["zstd -dc, the base"].seconds, runs["sha256sum, from a file"].seconds)
    report.say("## One disk back, against others\n")
    report.say(f"{target.path.name}, {size:,} bytes, all checked against the stream metadata. xdelta3, zstd --patch-from and rdiff want the base "
               f"plain on a disk beforehand, which is not counted; rdiff its delta as well. The floor is the slower of `zstd -dc` of the base and "
               f"`sha256sum`.\n")
    report.table(["what", "time", "rate", "first byte", "processor time", "peak memory (anonymous)", "of the floor"], [
        [name, f"{run.seconds:.2f} s", f"{size / run.seconds / 1e6:.0f} MB/s", f"{run.first:.2f} s" if run.bytes == size else "–",
         f"{run.cpu:.2f} s", f"{run.rss / MIB:.0f} MiB", f"{run.seconds / floor:.2f}"] for name, run in runs.items()])
    processors = len(os.sched_getaffinity(0))
    share = decode.cpu / processors
    report.say(f"Decoding the live rootfs with its own tool takes {decode.cpu:.2f} s of processor time, {share:.2f} s on {processors} "
               f"processors.\n")
    for name, of, least, most in (("rehydrate, fast", "the floor", floor, 1.5), ("rehydrate, small", "decoding the live rootfs", share, 1.3)):
        if name in runs:
            report.promise(f"{name}: time, of {of}", runs[name].seconds / least, most)
    report.bars(f"Time to get one disk back ({target.label}), in seconds",
                [[name, run.seconds, f"{run.seconds:.2f}", name.startswith("rehydrate")] for name, run in runs.items()])


def decode_rootfs(bench, bases):
    """Decodes all files of the live rootfs and, with EROFS, writes none of them."""
    image, tree = bases.path.with_name("root.image"), bases.path.with_name("tree")
    member = "root.erofs" if " erofs " in bench.options else "root.squashfs"
    Run(["cpio", "-i", "--quiet", "--to-stdout", "-F", bases.live.path, member], keep=image)
    if member == "root.squashfs":
        return best(1, ["unsquashfs", "-quiet", "-no-progress", "-d", tree, image])
    # The host's may know no LZMA.
    where = [CI / "trixie", "exec"] if subprocess.run([CI / "trixie", "--where"], capture_output=True).returncode == 0 else []
    return best(bench.args.repeat, [*where, "fsck.erofs", "--extract", image])
