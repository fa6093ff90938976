"""The inner loops by criterion (kernels.rs), as a table with the rate of each and that of its peer."""

import json
import shutil

from .release import CI
from .run import Run

PEER = "peer: "


def kernels(bench, report):
    report.say("## Kernels\n")
    home = bench.work.resolve() / "criterion"
    shutil.rmtree(home, ignore_errors=True)
    # As ci/build has them: the very code of the program is measured.
    command = ["cargo", "run", "--quiet", "--locked", "--profile", "dist", "--package", "rehydrator-benchmarks", "--", "--bench", "--noplot"]
    Run(command, env={"CRITERION_HOME": str(home), "RAYON_NUM_THREADS": "1"}, cwd=CI.parent)
    groups = {}
    for path in home.glob("**/new/benchmark.json"):
        about, times = json.loads(path.read_text()), json.loads(path.with_name("estimates.json").read_text())
        rate = about["throughput"]["Bytes"] / times["median"]["point_estimate"] * 1e3
        groups.setdefault(about["group_id"], {})[about["function_id"]] = rate
    rows = []
    for group, rates in sorted(groups.items()):
        peer = next((name for name in rates if name.startswith(PEER)), None)
        for name, rate in sorted(rates.items()):
            rows.append([group, name, f"{rate:.1f} MB/s", f"{rate / rates[peer]:.2f}" if peer and name != peer else ""])
    report.say(f"`RAYON_NUM_THREADS=1 {' '.join(command)}`: one processor, median rates of plain bytes. What folds makes the very "
               f"bytes of zlib, GNU gzip or xz; those of zlib-rs are others.\n")
    report.table(["group", "kernel", "rate", "of its peer's"], rows)
