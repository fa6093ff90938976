"""That a container gives back every file as published, or plain."""

import shutil
import subprocess
import time

from .release import CI
from .run import Failed, Run, output


def container(bench, report):
    report.say("## In a container\n")
    for profile in bench.args.profile:
        index = bench.index(profile)
        out = bench.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        Run(bench.rehydrator("rehydrate", out, "--all", "--data", bench.data(profile)))
        wanted = {a.path.name: a.sha256 for a in bench.artifacts}
        files = {a["output"]["name"]: wanted[a["published"]["name"]] for a in index["artifacts"]}
        listed = "".join(f"{digest}  {name}\n" for name, digest in files.items())
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet"], cwd=out, input=listed.encode(), check=True)
        name = output("podman", "pull", "--quiet", f"oci:{bench.image(profile)}")
        run = [CI / "podman", "run", "--rm", "-i", "--read-only", "--network=none", "--cap-drop=all", "--user", "1000", name, "rehydrate", "-"]
        start = time.monotonic()
        for artifact in index["artifacts"]:
            which, file = artifact["platform"], artifact["output"]["name"]
            options = ["--disk", which + ("4k" if artifact["format"].startswith("4k") else "")]
            compare = ["cmp", "-", out / file]
            if artifact["format"] in ("iso", "pxe"):
                options = [f"--{artifact['format']}"]
            if artifact["format"] == "pxe":
                compare = ["sh", "-c", 'tar -xOf - "$1" | cmp - "$1"', "sh", file]
            writer = subprocess.Popen([*run, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            same = subprocess.run(compare, cwd=out, stdin=writer.stdout)
            writer.stdout.close()
            if writer.wait() or same.returncode:
                raise Failed(f"{profile} {file}: {writer.stderr.read().decode(errors='replace')}")
        report.say(f"Profile {profile}: each of {len(files)} files, by `podman run {' '.join(run[2:9])}`, is the same as in a "
                   f"directory, where `sha256sum --check` finds what the stream metadata names: {time.monotonic() - start:.0f} s.\n")
        subprocess.run(["podman", "rmi", name], check=True, capture_output=True)
        shutil.rmtree(out)
