"""The release that is measured, and what the program makes of it."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from .run import LONG, Run, output

CI = Path(__file__).resolve().parent.parent


class Artifact(NamedTuple):
    label: str  # as rehydrate --disk has it
    format: str
    file: str
    path: Path
    sha256: str  # of the plain file

    @property
    def is_disk(self):
        return self.file == "disk" and self.format != "iso"


def decompress(path):
    """The command that writes the plain file to stdout."""
    tools = {".xz": ["xz", "-dc", "-T2"], ".gz": ["gzip", "-dc"], ".zip": ["unzip", "-p"]}
    return [*tools.get(path.suffix, ["cat"]), path]


class Bench:
    # What the program is started by, such as taskset.
    before = ()

    def __init__(self, args):
        self.args = args
        self.release, self.work, self.program = args.release, args.work, args.program
        self.work.mkdir(parents=True, exist_ok=True)
        self.stream = json.loads((self.release / "stream.json").read_text())
        self.options = (self.release / ".make-stream").read_text().strip()
        self.identity = f"{self.options} on {processor()}"
        arches = sorted(self.stream["architectures"])
        # That of most platforms, where there is a choice.
        self.arch = "x86_64" if "x86_64" in arches else arches[0]
        self.artifacts = []
        files = {f.name: f for f in self.release.glob("builds/*/*/*")}
        for name, of_platform in self.stream["architectures"][self.arch]["artifacts"].items():
            for format_, members in of_platform["formats"].items():
                for file, artifact in members.items():
                    path = files[artifact["location"].rsplit("/", 1)[-1]]
                    sha256 = artifact.get("uncompressed-sha256", artifact["sha256"])
                    label = "metal4k" if format_.startswith("4k") else name
                    self.artifacts.append(Artifact(label, format_, file, path, sha256))
        self.published = sum(a.path.stat().st_size for a in self.artifacts)

    def of(self, release, work):
        """The same of another release."""
        return Bench(argparse.Namespace(**{**vars(self.args), "release": release, "work": work}))

    def disk(self, *labels):
        """The disk of the first of these platforms that there is."""
        return next(a for label in labels for a in self.artifacts if a.label == label and a.is_disk)

    def has_disk(self, label):
        return any(a.label == label and a.is_disk for a in self.artifacts)

    def data(self, profile):
        return self.work / profile / "dehydrated"

    def index(self, profile):
        return json.loads((self.data(profile) / "index.json").read_text())

    def rehydrator(self, *args):
        return [*self.before, self.program, "--progress=none", *args]

    def dehydrate(self, profile, *options):
        """Dehydrates the release, or says None when that is done already; keeps what it said, with the time of each step."""
        work = self.work / profile
        if self.data(profile).exists():
            return None
        (work / "artifacts").mkdir(parents=True, exist_ok=True)
        Run(self.rehydrator("build", "init", "--stream-file", self.release / "stream.json", "--workdir", work))
        for artifact in self.artifacts:
            if not (work / "artifacts" / artifact.path.name).exists():
                os.link(artifact.path, work / "artifacts" / artifact.path.name)
                os.link(f"{artifact.path}.sig", work / "artifacts" / f"{artifact.path.name}.sig")
        run = Run([*self.before, self.program, "--progress=plain", "build", "dehydrate", "--arch", self.arch, "--profile", profile,
                   "--workdir", work, *options])
        (work / "said").write_bytes(run.err)
        (work / "cost.json").write_text(json.dumps({"seconds": run.seconds, "cpu": run.cpu, "rss": run.rss}))
        return run

    def cost(self, profile):
        """What dehydrating took, when it was done."""
        return argparse.Namespace(**json.loads((self.work / profile / "cost.json").read_text()))

    def image(self, profile):
        """The image, made of what is dehydrated."""
        image = self.work / profile / "image"
        shutil.rmtree(image, ignore_errors=True)
        Run(self.rehydrator("build", "image", "--workdir", self.work / profile, "-o", f"oci:{image}"))
        return image

    def machine(self, report):
        versions = [f"{tool} {version(tool)}" for tool in TOOLS if shutil.which(tool)]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        flags = set(re.search(r"(?:flags|Features)\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1].split())
        report.say("# Benchmarks\n")
        report.say(f"Made by `ci/bench` on {platform.system()} {platform.release()}, {processor()}, "
                   f"{len(os.sched_getaffinity(0))} processors, {'with' if flags & {'sha_ni', 'sha2'} else 'without'} instructions for SHA-256, "
                   f"{memory >> 30} GiB of memory; best of {self.args.repeat}, of one where that takes more than {LONG} s. {output(self.program, '--version')}; {', '.join(versions)}.\n")
        report.say(f"The release: {len(self.artifacts)} artifacts of {self.arch}, {self.published:,} bytes published; "
                   f"ci/make-stream with `{self.options}`.\n")


def processor():
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return model[1] if model else platform.machine()


TOOLS = ("xz", "zstd", "sha256sum", "qemu-img", "xdelta3", "rdiff", "rsync", "casync", "borg", "fsck.erofs", "skopeo", "umoci", "podman", "wget", "nginx")


def version(tool):
    """The first number with a dot in what a tool says of its version."""
    for option in ("--version", "-V", "-v"):
        said = subprocess.run([tool, option], capture_output=True, text=True)
        if found := re.search(r"\d+(\.\d+)+|casync \d+", said.stdout + said.stderr):
            return found[0].split()[-1]
    return "of unknown version"


def size_of(tree):
    return sum(f.stat().st_size for f in tree.rglob("*") if f.is_file())
