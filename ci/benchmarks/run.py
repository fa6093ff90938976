"""Runs commands and measures them."""

import contextlib
import os
import re
import select
import socket
import subprocess
import time
from pathlib import Path

MIB = 1 << 20


class Failed(Exception):
    """A command that did not do what was asked: the command, and what it said."""


class Run:
    """A command: its time, processor time, peak of anonymous memory, time to the first byte, and the first of what it printed;
    all of that in the file `keep`, when one is named."""

    def __init__(self, command, env=None, keep=None, cwd=None):
        start = time.monotonic()
        kept = open(keep, "wb") if keep else contextlib.nullcontext()
        process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})}, cwd=cwd,
        )
        os.set_blocking(process.stderr.fileno(), False)
        self.rss = self.bytes = 0
        self.first = None
        self.err = self.out = b""
        next_look = 0
        with kept:
            while True:
                chunk = None
                if select.select([process.stdout], [], [], 0.02)[0]:
                    # As a fast reader does: what is measured is the writer.
                    chunk = os.read(process.stdout.fileno(), MIB)
                now = time.monotonic()
                if chunk and self.first is None:
                    self.first = now - start
                if chunk and keep:
                    kept.write(chunk)
                self.bytes += len(chunk or b"")
                self.out = (self.out + (chunk or b""))[:4096]
                if now >= next_look:
                    self.look(process)
                    next_look = now + 0.02
                if chunk == b"":
                    break
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        self.seconds = time.monotonic() - start
        self.cpu = usage.ru_utime + usage.ru_stime
        self.peak = usage.ru_maxrss * 1024
        self.err += process.stderr.read() or b""
        if status:
            said = self.err.decode(errors="replace").strip()
            raise Failed(f"{' '.join(str(c) for c in command)}: exit status {os.waitstatus_to_exitcode(status)}\n{said}")

    def look(self, process):
        self.rss = max(self.rss, anonymous(process.pid))
        self.err += process.stderr.read() or b""

    def decodes(self):
        """Clusters of the live rootfs that were needed, and how often one was decoded."""
        found = re.findall(rb"clusters=(\d+).* decodes=(\d+)", self.err)
        return tuple(sum(int(f[i]) for f in found) for i in (0, 1)) if found else None


def anonymous(pid):
    """The anonymous memory of a process now."""
    try:
        found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


# A command that takes so long is run once: chance weighs little in it.
LONG = 15


def best(repeat, *args, **kwargs):
    run = Run(*args, **kwargs)
    return run if run.seconds > LONG else min([run, *(Run(*args, **kwargs) for _ in range(repeat - 1))], key=lambda run: run.seconds)


def all_in_turn(repeat, measures):
    """All runs of each measure, a function; they take turns, so that other load on the machine meets them all."""
    return list(zip(*([measure() for measure in measures] for _ in range(repeat))))


def in_turn(repeat, measures):
    """The best run of each measure."""
    return [min(runs, key=lambda run: run.seconds) for runs in all_in_turn(repeat, measures)]


def output(*command):
    """What a command prints, which is not measured."""
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout.strip()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def nginx(top, port, site):
    """The command that serves a site on this port of the machine; what nginx needs besides lies in the directory `top`."""
    top = top.resolve()
    places = " ".join(f"{of}_temp_path {top}/temp;" for of in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (top / "nginx.conf").write_text(
        f"user root; daemon off; worker_processes auto; pid {top}/pid; error_log stderr; events {{ }} http {{ access_log off; {places}"
        f" sendfile on; tcp_nopush on; server {{ listen 127.0.0.1:{port}; {site} }} }}")
    return ["nginx", "-c", top / "nginx.conf", "-e", "stderr"]


def await_port(server, port):
    """Until a server that was started listens on this port."""
    while True:
        with socket.socket() as up:
            if up.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            raise Failed(f"{server.args}: exit status {server.returncode}")
        time.sleep(0.1)


@contextlib.contextmanager
def serving(command, port):
    """While a server runs that listens on this port of the machine."""
    server = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(server, port)
        yield
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def registry(top):
    """While a docker-registry runs that keeps all in the directory `top`, new; where it is."""
    port = free_port()
    top.mkdir(parents=True)
    (top / "registry.yml").write_text(
        f"{{version: 0.1, log: {{level: error, accesslog: {{disabled: true}}}}, http: {{addr: '127.0.0.1:{port}'}},"
        f" storage: {{filesystem: {{rootdirectory: '{top.resolve()}/registry'}}}}}}\n")
    with serving(["docker-registry", "serve", top / "registry.yml"], port):
        yield f"127.0.0.1:{port}"
