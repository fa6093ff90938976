"""What the parts found: printed at once, kept beside the work, and put together to one Markdown file with a chart and the data of both."""

import json
import time

from . import chart


class Report:
    """One part: Markdown, and panels of bars for the chart."""

    def __init__(self):
        self.lines = []
        self.panels = []
        self.missed = []

    def say(self, text=""):
        print(text, flush=True)
        self.lines.append(text)

    def promise(self, what, ratio, most):
        """Something that must not be more than so much."""
        kept = ratio <= most
        self.say(f"{what}: {ratio:.2f}; promised is at most {most}{'' if kept else ', **which it is not**'}.\n")
        if not kept:
            self.missed.append(f"{what}: {ratio:.3f}, more than {most}")

    def table(self, head, rows):
        self.say("| " + " | ".join(head) + " |")
        self.say("| --- |" + " ---: |" * (len(head) - 1))
        for row in rows:
            self.say("| " + " | ".join(str(c) for c in row) + " |")
        self.say()

    def commands(self, commands):
        self.say("```")
        for command in commands:
            self.say(command if isinstance(command, str) else " ".join(str(c) for c in command))
        self.say("```\n")

    def bars(self, title, rows):
        """Rows of a label, a number, its text, and whether the program made it."""
        self.panels.append([title, rows])

    def keep(self, path, of):
        """What a run of this part found, for a document that is put together later; `of` says of which release, on what machine."""
        path.parent.mkdir(exist_ok=True)
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        path.write_text(json.dumps({"of": of, "when": when, "lines": self.lines, "panels": self.panels}))


def document(output, head, kept, of):
    """Writes the Markdown, and beside it its chart and its data, of the parts that were kept and are of the same release.
    A part that was not measured again stays as it was."""
    data = output.with_suffix(".json")
    before = json.loads(data.read_text()) if data.exists() else {}
    found = {**before, **{path.stem: json.loads(path.read_text()) for path in kept if path.exists()}}
    parts = {path.stem: found[path.stem] for path in kept if found.get(path.stem, {}).get("of") == of}
    data.write_text(json.dumps(parts, indent=1) + "\n")
    picture = output.with_suffix(".svg")
    panels = [panel for part in parts.values() for panel in part["panels"]]
    lines = list(head.lines)
    if panels:
        picture.write_text(chart.svg(panels))
        lines += [f"![The same as bars; all figures are in the tables below]({picture.name})", ""]
    for part in parts.values():
        lines += [*part["lines"], f"Measured {part['when']} UTC.", ""]
    output.write_text("\n".join(lines).rstrip("\n") + "\n")
