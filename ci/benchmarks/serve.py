"""The ISO over HTTP against nginx, a thousand of it, and 64 files at the same time."""

import hashlib
import json
import os
import re
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .run import MIB, await_port, free_port, nginx


def serve(bench, report):
    report.say("## Serve\n")
    top = bench.work / "serve"
    top.mkdir(exist_ok=True)
    iso = next(a.path for a in bench.artifacts if a.format == "iso")
    with Rehydrator(bench, top) as ours, Nginx(top, bench.release) as peer:
        urls = {"rehydrator serve": (ours, ours.of(bench, iso)),
                "nginx, sendfile": (peer, f"{peer.url}/{iso.relative_to(bench.release)}")}
        size = iso.stat().st_size
        for _, url in urls.values():
            # The first one waits until it is made; both have it in memory then.
            fetch(url, 1, 1, size)
        rows, bests = [], []
        for clients in (1, 8, 64):
            runs = {name: [] for name in urls}
            count = max(clients, min(1000, 5_000_000_000 // size))
            for _ in range(bench.args.repeat):
                # In turns: what else the machine does falls on both.
                for name, (server, url) in urls.items():
                    before, start = server.cpu(), time.monotonic()
                    fetch(url, count, clients, size)
                    runs[name].append((time.monotonic() - start, server.cpu() - before))
            best = {name: min(run) for name, run in runs.items()}
            bests.append(best)
            for name, (seconds, cpu) in best.items():
                rows.append([f"{name}, {clients} at a time", f"{count * size / seconds / 1e6:.0f} MB/s", f"{cpu / count / size * 1e9:.2f} s",
                             f"{best['nginx, sendfile'][0] / seconds:.2f}"])
        report.table(["the ISO, to curl", "rate", "processor time of the server for 1 GB", "of nginx"], rows)
        slowest = max(best["rehydrator serve"][0] / best["nginx, sendfile"][0] for best in bests)
        report.promise("The ISO: time, of nginx's, at the worst", slowest, 1.25)
        thousand(report, ours, urls["rehydrator serve"][1], size)
    with Rehydrator(bench, top) as ours:
        disks(bench, report, ours)


def fetch(url, count, clients, size):
    """Gets a URL so many times, and checks that each is whole."""
    command = ["curl", "-sS", "--fail-early", "-w", "%{http_code} %{size_download}\n", "--parallel", "--parallel-immediate",
               "--parallel-max", str(clients), "-o", "/dev/null", f"{url}?[1-{count}]"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"200 {size}\n" * count, said


def thousand(report, ours, url, size):
    start = time.monotonic()
    fetch(url, 1000, 64, size)
    seconds = time.monotonic() - start
    report.say(f"1000 of the ISO, 64 at a time: {1000 * size / 1e9:.0f} GB in {seconds:.0f} s, all of them whole; peak memory of the "
              f"server until then {ours.peak() / MIB:.0f} MiB, of which anonymous at the end {ours.anonymous() / MIB:.0f} MiB.\n")
    assert ours.peak() < 512 * MIB


def disks(bench, report, ours):
    """As many different files as there are, up to 64, each as published or uncompressed."""
    files = []
    document = json.load(urllib.request.urlopen(f"{ours.url}/streams/{bench.stream['stream']}.json"))
    for arch in document["architectures"].values():
        for platform in arch["artifacts"].values():
            for members in platform["formats"].values():
                for artifact in members.values():
                    if "uncompressed-sha256" in artifact:
                        files.append((artifact["location"].rsplit(".", 1)[0], artifact["uncompressed-sha256"]))
                    files.append((artifact["location"], artifact["sha256"]))
    # The disks first.
    files = sorted(files, key=lambda file: "-live-" in file[0])[:64]

    def get(file):
        url, digest = file
        sha, total = hashlib.sha256(), 0
        with urllib.request.urlopen(url) as response:
            while chunk := response.read(MIB):
                sha.update(chunk)
                total += len(chunk)
        assert sha.hexdigest() == digest, url
        return total

    start = time.monotonic()
    with ThreadPoolExecutor(len(files)) as pool:
        whole = sum(pool.map(get, files))
    seconds = time.monotonic() - start
    report.say(f"{len(files)} different files, all at the same time: {whole / 1e9:.1f} GB in {seconds:.0f} s, each with the digest of the "
              f"stream metadata; peak memory of the server {ours.peak() / MIB:.0f} MiB.\n")
    assert ours.peak() < 512 * MIB


class Server:
    def __init__(self, process):
        self.process = process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def processes(self):
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def cpu(self):
        """Seconds of processor time, of all its processes."""
        ticks = 0
        for pid in self.processes():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def status(self, name):
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s*(\d+) kB", text)[1]) << 10

    def peak(self):
        return self.status("VmHWM")

    def anonymous(self):
        return self.status("RssAnon")


class Rehydrator(Server):
    def __init__(self, bench, top):
        command = bench.rehydrator("serve", "--data", bench.data("small"), "--listen=127.0.0.1:0", "--memory=256M",
                                   "--access-log=none", "--cache", top)
        super().__init__(subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True))
        for line in self.process.stderr:
            if found := re.search(r"listening on (\S+)", line):
                self.url = f"http://{found[1]}"
                break

    def of(self, bench, path):
        """Where it has a file of the release."""
        build = path.parent.parent.name
        return f"{self.url}/prod/streams/{bench.stream['stream']}/builds/{build}/{path.parent.name}/{path.name}"


class Nginx(Server):
    def __init__(self, top, root):
        port = free_port()
        super().__init__(subprocess.Popen([str(c) for c in nginx(top, port, f"root {root.resolve()};")]))
        self.url = f"http://127.0.0.1:{port}"
        await_port(self.process, port)
