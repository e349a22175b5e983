"""The report of a comparison: one self-contained HTML page with a light and a dark theme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.backtest.contest import TUNED, Row
from kvpilot_operator.backtest.score import LAMBDAS
from kvpilot_operator.backtest.tables import Line

WIDTH, HEIGHT, MARGIN = 640, 360, 48
"""Size of the chart, px."""

COUNTS = ("reversals", "wrong way", "hold min")

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr.kvpilot { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.better { color: light-dark(#0a7a3c, #5fd38d); } .worse { color: light-dark(#b3261e, #ff8a80); }
"""


def report_html(lines: Sequence[Line], rows: Sequence[Row], sentences: Sequence[str]) -> str:
    """The page.

    Args:
        lines: one per controller.
        rows: one per run.
        sentences: sentences on load and deployment.
    """
    seeds = len({row["seed"] for row in rows})
    body = "\n".join(
        [
            "<h1>Backtest</h1>",
            *(f"<p>{escape(sentence)}</p>" for sentence in sentences),
            f"<p>{counted(seeds, 'seed')}. "
            "A controller is the better the nearer it is to the lower left.</p>",
            _chart(lines, rows),
            _table(lines),
            "<h2>Score of kvpilot minus that of the other</h2>",
            "<p>Score = violation minutes + &lambda; &times; GPU-hours, paired by seed, with its 95% "
            "interval (bootstrap). Below 0 kvpilot is better.</p>",
            _differences(lines),
        ]
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>kvpilot backtest</title><style>{STYLE}</style>'
        f"<body>{body}</body></html>\n"
    )


def _table(lines: Sequence[Line]) -> str:
    heads = ("controller", "parameters", "violation min", "GPU-hours", "cure s", *COUNTS)
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(_table_row(line) for line in lines)}</table>"


def _table_row(line: Line) -> str:
    cells = (
        escape(line.controller),
        escape(line.parameters or "-"),
        f"{line.violation_minutes:.1f}",
        f"{line.gpu_hours:.2f}",
        "-" if line.cure_s is None else f"{line.cure_s:.0f}",
        f"{line.reversals:.1f}",
        f"{line.wrong_direction:.1f}",
        f"{line.hold_minutes:.1f}",
    )
    kind = ' class="kvpilot"' if line.controller == TUNED else ""
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _differences(lines: Sequence[Line]) -> str:
    head = "".join(f"<th>&lambda; = {weight:g}</th>" for weight in LAMBDAS)
    body = "".join(
        f"<tr><td>{escape(line.controller)}</td>"
        + "".join(
            f'<td class="{item.verdict.split()[0]}">{item.mean:+.1f} [{item.low:+.1f}, {item.high:+.1f}]</td>'
            for item in line.differences
        )
        + "</tr>"
        for line in lines
        if line.differences
    )
    return f"<table><tr><th>controller</th>{head}</tr>{body}</table>"


def _chart(lines: Sequence[Line], rows: Sequence[Row]) -> str:
    """Violation minutes over GPU-hours: a small dot per run, a large one for the mean."""
    most_x = max((row["gpu_hours"] for row in rows), default=0.0) * 1.1 or 1.0
    most_y = max((row["violation_minutes"] for row in rows), default=0.0) * 1.1 or 1.0

    def place(hours: float, minutes: float) -> tuple[float, float]:
        x = MARGIN + hours / most_x * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - minutes / most_y * (HEIGHT - 2 * MARGIN)

    def marks() -> Iterator[str]:
        for number, line in enumerate(lines):
            colour = f"hsl({number * 47 % 360} 70% 45%)"
            for row in rows:
                if row["controller"] == line.controller:
                    x, y = place(row["gpu_hours"], row["violation_minutes"])
                    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}" opacity=".5"/>'
            x, y = place(line.gpu_hours, line.violation_minutes)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>'
            yield f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">{escape(line.controller)}</text>'

    left, bottom = MARGIN, HEIGHT - MARGIN
    axes = (
        f'<path d="M{left} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="currentColor"/>'
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 30}" text-anchor="end">GPU-hours (to {most_x:.1f})</text>'
        f'<text x="{left}" y="{MARGIN - 12}">violation minutes (to {most_y:.0f})</text>'
    )
    label = "Violation minutes over GPU-hours"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{axes}{"".join(marks())}</svg>'
    )
