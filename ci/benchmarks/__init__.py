"""The parts of ci/bench: each is a function of a Bench (release.py) that writes to a Report (report.py)."""
