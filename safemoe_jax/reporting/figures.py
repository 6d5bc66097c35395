"""The report's figures as inline SVG: they scale, print, and follow the page's colours in light and dark.

Colours are CSS classes of the page (`c-NAME` for a condition), so a figure carries none of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from safemoe_jax.reporting.run_folder import Condition, Measure
from safemoe_jax.reporting.tables import number, significant

WIDTH = 920
LABEL_WIDTH = 206
PALETTE = {"aligned": 0, "undefended": 1, "safemoe": 2, "safemoe_anchored": 3}
FREE_COLOURS = 3  # classes c-4 .. c-6, for conditions that the palette does not name

# Nats. The strongest colour stands for at least this much drift: a model that has not drifted stays pale.
# At 0.1 nats up to 22 % of the routing probability has gone elsewhere (Pinsker); an undefended attack on the
# built-in organism gives 0.1 to 0.5 on average over its layers, a defence that holds 0.0004 to 0.003.
LEAST_PEAK = 0.1
LEGEND_STEPS = 8


def colour_class(condition: Condition, position: int) -> str:
    """CSS class of a condition: its own where it has one, else the next free one by position."""
    known = len(PALETTE)
    return f"c-{PALETTE.get(condition.name, known + position % FREE_COLOURS)}"


def interval_chart(conditions: Sequence[Condition]) -> str:
    """Harmfulness, over-refusal and task accuracy of each condition: a dot with its 95 % interval."""
    row, top = 34, 30
    bottom = top + row * len(conditions)
    panels: tuple[tuple[str, Callable[[Condition], Measure], int, int], ...] = (
        ("harmful prompts answered", lambda c: c.hs, LABEL_WIDTH, 250),
        ("harmless prompts refused", lambda c: c.over_refusal, LABEL_WIDTH + 290, 175),
        ("task accuracy", lambda c: c.fa, LABEL_WIDTH + 508, 175),
    )
    parts = [
        _text(0, top + row * i + row / 2 + 4, condition.title, "label")
        for i, condition in enumerate(conditions)
    ]
    for title, measure, left, width in panels:
        parts += [_text(left, 12, title, "axis-title"), *_percent_grid(left, width, top, bottom)]
        for i, condition in enumerate(conditions):
            y = top + row * i + row / 2
            parts += _interval(measure(condition), left, width, y, colour_class(condition, i))
    return _svg(bottom + 26, parts, "Harmfulness, over-refusal and task accuracy with 95 % intervals")


def _percent_grid(left: float, width: float, top: float, bottom: float) -> list[str]:
    parts = []
    for tick in (0, 50, 100):
        x = left + width * tick / 100
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 16, f"{tick}", "tick middle")]
    return parts


def _interval(measure: Measure, left: float, width: float, y: float, colour: str) -> list[str]:
    if measure.value is None:
        return [_text(left + 4, y + 4, "not measured", "tick")]
    x = left + width * measure.value / 100
    parts = []
    if measure.low is not None and measure.high is not None:
        low, high = left + width * measure.low / 100, left + width * measure.high / 100
        parts.append(_line(low, y, high, y, f"whisker stroke {colour}"))
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="dot fill {colour}"/>')
    edge = x if measure.high is None else left + width * measure.high / 100
    # Near the right edge the value is written on the left, so that panels stay apart.
    if edge - left > width - 46:
        start = x if measure.low is None else left + width * measure.low / 100
        return [*parts, _text(min(start, x - 5.5) - 6, y + 4, number(measure.value, 1), "value end")]
    return [*parts, _text(max(edge, x + 5.5) + 6, y + 4, number(measure.value, 1), "value")]


def drift_heatmap(conditions: Sequence[Condition]) -> str:
    """Routing drift of each MoE layer (columns) in each condition (rows); darker is further from aligned."""
    rows = [condition for condition in conditions if condition.drift_by_layer]
    if not rows:
        return ""
    columns = max(len(condition.drift_by_layer) for condition in rows)
    peak = max(LEAST_PEAK, *(max(condition.drift_by_layer) for condition in rows))
    cell, height, top = min(178.0, (WIDTH - LABEL_WIDTH) / columns), 38, 26
    parts = [_text(LABEL_WIDTH, 12, "MoE layer", "axis-title"), *_heat_legend(peak)]
    for i, condition in enumerate(rows):
        y = top + i * height
        parts.append(_text(0, y + height / 2 + 4, condition.title, "label"))
        for j, value in enumerate(condition.drift_by_layer):
            parts += _cell(LABEL_WIDTH + j * cell, y, cell - 3, height - 3, value, peak, numbers=cell >= 40)
    bottom = top + height * len(rows)
    for j, layer in enumerate(max((condition.layers for condition in rows), key=len)):
        parts.append(_text(LABEL_WIDTH + (j + 0.5) * cell - 1.5, bottom + 14, str(layer), "tick middle"))
    return _svg(bottom + 22, parts, "Routing drift by layer, mean KL divergence in nats")


def _cell(
    x: float, y: float, width: float, height: float, value: float, peak: float, *, numbers: bool
) -> list[str]:
    # The square root keeps small drifts apart on a scale that one attacked model would otherwise fill alone.
    strength = math.sqrt(max(value, 0.0) / peak)
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3"'
    parts = [
        f'<rect {box} class="heat-base"/>',
        f"<rect {box} {_shade(strength)}><title>{value:.4g} nats</title></rect>",
    ]
    if numbers:
        tone = "on-heat" if strength > 0.6 else "value"
        parts.append(_text(x + width / 2, y + height / 2 + 4, significant(value), f"{tone} middle"))
    return parts


def _heat_legend(peak: float) -> list[str]:
    """The shades from no drift to the strongest colour, with the values at both ends, right of the title.

    Apart from each other, as the cells are: where two transparent edges met there would be a seam.
    """
    right, step, height = WIDTH - 76, 18, 12
    left = right - step * LEGEND_STEPS
    parts = []
    for i in range(LEGEND_STEPS):
        box = f'x="{left + i * step}" y="2" width="{step - 2}" height="{height}" rx="2"'
        shade = _shade(i / (LEGEND_STEPS - 1))
        parts += [f'<rect {box} class="heat-base"/>', f"<rect {box} {shade}/>"]
    ends = (left - 6, "0", "tick end"), (right + 4, f"{significant(peak)} nats", "tick")
    return parts + [_text(x, 12, text, classes) for x, text, classes in ends]


def _shade(strength: float) -> str:
    return f'class="heat" style="fill-opacity:{strength:.3f}"'


def curve_chart(conditions: Sequence[Condition]) -> str:
    """Harmfulness over optimizer steps, one line a condition that recorded it."""
    curves = [(i, condition) for i, condition in enumerate(conditions) if len(condition.hs_curve) > 1]
    if not curves:
        return ""
    left, right, top, bottom = 46, WIDTH - 210, 14, 264
    last = max(condition.hs_curve[-1][0] for _, condition in curves)

    def place(step: float, hs: float) -> tuple[float, float]:
        return left + (right - left) * step / max(last, 1), bottom - (bottom - top) * hs / 100

    parts = []
    for tick in (0, 25, 50, 75, 100):
        _, y = place(0, tick)
        parts += [_line(left, y, right, y, "grid"), _text(left - 8, y + 4, f"{tick} %", "tick end")]
    for tick in _ticks(last):
        x, _ = place(tick, 0)
        parts.append(_text(x, bottom + 18, f"{tick:g}", "tick middle"))
    parts.append(_text(right, bottom + 34, "task step", "axis-title end"))
    labels = _spread([place(*condition.hs_curve[-1])[1] for _, condition in curves], gap=17)
    for (i, condition), label_y in zip(curves, labels, strict=True):
        colour = colour_class(condition, i)
        points = [place(step, hs) for step, hs in condition.hs_curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" class="curve stroke {colour}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" class="fill {colour}"/>' for x, y in points]
        parts.append(_text(right + 12, label_y + 4, condition.title, f"curve-label fill {colour}"))
    return _svg(bottom + 42, parts, "Harmfulness over training steps")


def training_chart(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Task loss, and the routing penalty where a defence reported one, over optimizer steps."""
    panels = [
        ("task loss", [(row["step"], row["loss"]) for row in metrics if row.get("kind") == "task"], "c-2"),
        (
            "routing penalty",
            [(row["step"], row["routing_penalty"]) for row in metrics if "routing_penalty" in row],
            "c-3",
        ),
    ]
    panels = [panel for panel in panels if len(panel[1]) > 1]
    width = 400
    parts = []
    for i, (title, points, colour) in enumerate(panels):
        parts += _line_panel(title, points, colour, left=46 + i * (width + 70), width=width)
    return _svg(220, parts, "Loss and routing penalty over training steps") if panels else ""


def _line_panel(
    title: str, points: Sequence[tuple[float, float]], colour: str, *, left: float, width: float
) -> list[str]:
    """One line over steps, from 0 to its largest value."""
    top, bottom = 30, 180
    peak = max(value for _, value in points) or 1.0
    last = max(step for step, _ in points)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + width * step / max(last, 1), bottom - (bottom - top) * max(value, 0.0) / peak

    parts = [_text(left, 14, title, "axis-title")]
    for share in (0, 0.5, 1):
        _, y = place(0, share * peak)
        parts += [
            _line(left, y, left + width, y, "grid"),
            _text(left - 8, y + 4, f"{share * peak:.2g}", "tick end"),
        ]
    for tick in _ticks(last):
        parts.append(_text(place(tick, 0)[0], bottom + 18, f"{tick:g}", "tick middle"))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    return [*parts, f'<polyline points="{path}" class="curve stroke {colour}"/>']


def _ticks(last: float) -> list[float]:
    """About five round steps from 0 to `last`."""
    raw = max(last, 1) / 5
    scale = 10 ** math.floor(math.log10(raw))
    stride = max(1, next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw))
    return [k * stride for k in range(int(last // stride) + 1)]


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves labels apart just far enough that none lies on another; their vertical order stays."""
    placed = list(positions)
    order = sorted(range(len(placed)), key=lambda i: placed[i])
    for above, below in zip(order, order[1:], strict=False):
        placed[below] = max(placed[below], placed[above] + gap)
    # What ran past the lowest given position is pushed back up, lowest first.
    overflow = placed[order[-1]] - max(positions)
    for k in reversed(range(len(order))):
        limit = max(positions) + overflow / 2 if k == len(order) - 1 else placed[order[k + 1]] - gap
        placed[order[k]] = min(placed[order[k]], limit)
    return placed


def _svg(height: float, parts: Sequence[str], description: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"/>'
