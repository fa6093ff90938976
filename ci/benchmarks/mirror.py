"""A release of Container Linux of 1 GB on loopback, against wget."""

import json
import os
import shutil

from .run import MIB, Run, free_port, in_turn, nginx, serving


def mirror(bench, report):
    report.say("## Mirror\n")
    top = bench.work / "mirror"
    shutil.rmtree(top, ignore_errors=True)
    www, home, out = top / "www", top / "gnupg", top / "out"
    version = www / "stable/amd64-usr/1.0.0"
    version.mkdir(parents=True)
    home.mkdir(mode=0o700)
    files = publish(version, top, home, bench.args.digest)
    whole = sum(file.stat().st_size for file in version.iterdir())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (top / "mirror.json").write_text(json.dumps({"sources": [
        {"type": "container-linux", "url": f"{url}/{{channel}}/{{arch}}-usr/", "keys": ["key.asc"]}]}))
    server = nginx(top, port, f"root {www.resolve()}; autoindex on;")

    def afresh(command):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        return Run(command)

    verify = ["sh", "-ec", 'for file; do gpg --homedir "$0" --batch --quiet --verify "$file.sig" "$file"; done', home,
              *(out / file.relative_to(www) for file in files)]
    with serving(server, port):
        wget, synced, verified, ours = in_turn(bench.args.repeat, [
            lambda: afresh(["wget", "-r", "-np", "-nH", "-q", "-P", out, f"{url}/stable/amd64-usr/1.0.0/"]),
            lambda: Run(["sync"]),
            lambda: Run(verify),
            lambda: afresh(bench.rehydrator("mirror", "releases", top / "mirror.json", out)),
        ])
    shutil.rmtree(top)

    def row(what, *parts):
        seconds = sum(p.seconds for p in parts)
        return [what, f"{seconds:.2f} s", f"{sum(p.cpu for p in parts):.2f} s", f"{whole / seconds / 1e6:.0f} MB/s",
                f"{seconds / ours.seconds:.2f}", f"{max(p.peak for p in parts) / MIB:.0f} MiB"]

    report.table(["what", "time", "processor time", "rate", "the mirror is so many times as fast", "peak memory"], [
        row("wget -r -np", wget), row("and sync", wget, synced), row("and gpg --verify of each file", wget, synced, verified),
        row("mirror releases", ours)])
    report.say(f"{len(files)} files of {whole:,} bytes, RSA 4096 over {bench.args.digest}. wget checks nothing, and leaves the files in memory.\n")


def publish(version, top, home, digest):
    """Files of chance, 1 GB of them, signed as upstream does."""
    gpg = ["gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", ""]
    Run([*gpg, "--quick-generate-key", "bench", "rsa4096", "sign", "never"])
    Run([*gpg, "--armor", "--output", top / "key.asc", "--export"])
    (version / "version.txt").write_text("FLATCAR_VERSION_ID=1.0.0\n")
    for megabytes in (300, 200, 150, 100, 80, 60, 50, 30, 20, 10):
        with open(version / f"flatcar_production_{megabytes}.bin.bz2", "wb") as file:
            for _ in range(megabytes):
                file.write(os.urandom(1_000_000))
    files = sorted(version.iterdir())
    for file in files:
        Run([*gpg, "--digest-algo", digest, "--detach-sign", file])
    (version.parent / "current").symlink_to("1.0.0")
    return files
