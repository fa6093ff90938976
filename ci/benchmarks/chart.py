"""Panels of horizontal bars as an SVG that needs nothing from elsewhere, for light and dark backgrounds."""

from html import escape

WIDTH, LABEL, VALUE, ROW, TITLE = 860, 300, 150, 22, 44

# The background is drawn too: a page may be dark where the browser asks for light.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.label { text-anchor: end }
.ground { fill: #ffffff }
.ours { fill: #1a7f37 }
.peer { fill: #8c959f }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.ground { fill: #0d1117 }
.ours { fill: #3fb950 }
.peer { fill: #6e7681 }
}"""


def svg(panels):
    parts, y = [], 8
    for title, rows in panels:
        parts.append(f'<text class="title" x="16" y="{y + 24}">{escape(title)}</text>')
        y += TITLE
        longest = max((value for _, value, _, _ in rows), default=0) or 1
        for label, value, text, ours in rows:
            length = max(1, value / longest * (WIDTH - LABEL - VALUE))
            parts.append(f'<text class="label" x="{LABEL - 10}" y="{y + 13}">{escape(label)}</text>')
            parts.append(f'<rect class="{"ours" if ours else "peer"}" x="{LABEL}" y="{y + 2}" width="{length:.1f}" height="15"/>')
            parts.append(f'<text x="{LABEL + length + 8:.1f}" y="{y + 13}">{escape(text)}</text>')
            y += ROW
    y += 16
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" role="img">',
        f"<title>{escape('; '.join(title for title, _ in panels))}</title>",
        f"<style>{STYLE}\n</style>", f'<rect class="ground" width="{WIDTH}" height="{y}"/>', *parts, "</svg>", ""])
