"""The image of the release into a registry, and from one registry to another, against skopeo."""

import itertools
import shutil

from .run import MIB, Run, in_turn, registry


def push(bench, report):
    report.say("## Push an image\n")
    work = bench.work / "push"
    shutil.rmtree(work, ignore_errors=True)
    layout = f"oci:{bench.image('small')}"
    names = itertools.count()

    def to(host):
        return f"{host}/coreos/stable"

    def into_new(command):
        """What a command, of the registry's address, takes with a registry that has nothing yet."""
        top = work / f"registry{next(names)}"
        with registry(top) as host:
            run = Run(command(host))
        shutil.rmtree(top)
        return run

    skopeo = ["skopeo", "copy", "--quiet", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"]
    mirror = bench.rehydrator("mirror", "image", "--tls-verify=false")
    with registry(work / "origin") as origin:
        first = f"docker://{to(origin)}"
        Run([*skopeo, layout, first])
        whats = {
            "`skopeo copy`, layout to registry": lambda host: [*skopeo, layout, f"docker://{to(host)}"],
            "build image -o docker://": lambda host: bench.rehydrator(
                "build", "image", "--workdir", bench.work / "small", "--tls-verify=false", "-o", f"docker://{to(host)}"),
            "mirror image, layout to registry": lambda host: [*mirror, layout, f"docker://{to(host)}"],
            "`skopeo copy`, registry to registry": lambda host: [*skopeo, first, f"docker://{to(host)}"],
            "mirror image, registry to registry": lambda host: [*mirror, first, f"docker://{to(host)}"],
        }
        runs = in_turn(bench.args.repeat, [lambda command=command: into_new(command) for command in whats.values()])
    shutil.rmtree(work)
    report.say("The image of profile small into an empty docker-registry on this machine; `build image` makes the layers meanwhile: most of its time goes into compressing the program.\n")
    report.table(["what", "time", "processor time", "peak memory (anonymous)", "times as fast as skopeo"], [
        [what, f"{run.seconds:.2f} s", f"{run.cpu:.2f} s", f"{run.rss / MIB:.0f} MiB",
         f"{theirs.seconds / run.seconds:.2f}"] for what, run, theirs in zip(whats, runs, [runs[0]] * 3 + [runs[3]] * 2)])
