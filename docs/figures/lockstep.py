"""Draws docs/lockstep.svg: how calibration batches wait for each other at every layer.

    python docs/figures/lockstep.py

Plain SVG without scripts or fonts of its own; it has a background and follows the reader's light
or dark mode.
"""

from __future__ import annotations

import argparse
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 760, 330
LANES = [76, 116, 156]
LEFT, COLUMN, LAYERS = 84, 222, 3
TITLE = (
    "Calibration in lockstep: batches stop at each layer, it is pruned, and all go on through it"
)
STYLE = """
  .paper { fill: #ffffff } .ink { fill: #1f2328 } .pale { fill: #59636e }
  .line { stroke: #59636e; stroke-width: 1.5; fill: none } .tip { fill: #59636e }
  .gate { stroke: #bc4c00; stroke-width: 2; stroke-dasharray: 5 4 }
  .stop { fill: #bc4c00 } .run { fill: #80b3f0 } .note { fill: #f6e3d4 } .cut { fill: #b4e0bd }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  .small { font-size: 12px }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #f0f6fc } .pale { fill: #9198a1 }
    .line { stroke: #9198a1 } .tip { fill: #9198a1 } .gate { stroke: #f0883e }
    .stop { fill: #f0883e } .run { fill: #1f5fa8 } .note { fill: #5a3214 } .cut { fill: #1c5a2b }
  }
"""


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, wide: float, high: float, kind: str, words: str = "") -> list[str]:
    drawn = f'<rect class="{kind}" x="{x}" y="{y}" width="{wide}" height="{high}" rx="4"/>'
    return [drawn, text(x + wide / 2, y + high / 2 + 5, words)] if words else [drawn]


def arrow(x: float, y: float, to_x: float, to_y: float) -> list[str]:
    """A line along one axis, with a tip."""
    across, sign = y == to_y, 1 if to_x + to_y > x + y else -1
    (a, b), (c, d) = ((-7, -4), (-7, 4)) if across else ((-4, -7), (4, -7))
    if not across or sign < 0:
        a, b, c, d = (a * sign, b, c * sign, d) if across else (a, b * sign, c, d * sign)
    tip = f"{to_x},{to_y} {to_x + a},{to_y + b} {to_x + c},{to_y + d}"
    line = f'<path class="line" d="M{x} {y}L{to_x} {to_y}"/>'
    return [line, f'<polygon class="tip" points="{tip}"/>']


def layer(number: int) -> list[str]:
    """One layer: the batches that come, the gate, what is done there, the batches that go on."""
    x = LEFT + (number - 1) * COLUMN
    gate, drawn = x + 66, []
    drawn.append(
        f'<path class="gate" d="M{gate} {LANES[0] - 18}V{LANES[-1] + 20}"/>',
    )
    drawn.append(text(gate, LANES[0] - 24, f"stop at layer {number}", "pale small"))
    for y in LANES:
        drawn += arrow(x, y, gate - 7, y)
        drawn.append(f'<circle class="stop" cx="{gate}" cy="{y}" r="6"/>')
        drawn += arrow(gate + 7, y, gate + 48, y)
        drawn += box(gate + 48, y - 14, 108, 28, "run", f"layer {number}, pruned")
    drawn += arrow(gate, LANES[-1] + 20, gate, 206)
    drawn += box(gate - 56, 206, 112, 44, "note")
    drawn.append(text(gate, 224, "moments of all"))
    drawn.append(text(gate, 240, "batches&#8217; inputs"))
    drawn += arrow(gate + 56, 228, gate + 80, 228)
    drawn += box(gate + 80, 206, 70, 44, "cut")
    drawn += [text(gate + 115, 224, "prune"), text(gate + 115, 240, f"layer {number}")]
    drawn += arrow(gate + 115, 206, gate + 115, LANES[-1] + 16)
    return drawn


def picture() -> str:
    """The whole figure."""
    body = [text(LEFT - 70, 24, TITLE, "ink", "start")]
    for number, y in enumerate(LANES, 1):
        body.append(text(LEFT - 8, y + 5, f"batch {number}", "ink", "end"))
    for number in range(1, LAYERS + 1):
        body += layer(number)
    said = (
        "Every layer computes once per batch, on inputs that passed all earlier layers as pruned.",
        "A forward is a coroutine, so this needs nothing of the model but that it runs.",
    )
    for i, words in enumerate(said):
        body.append(text(LEFT - 70, 288 + 20 * i, words, "pale", "start"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img">',
            f"<title>{TITLE}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
            *body,
            "</svg>\n",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS / "lockstep.svg")
    parser.parse_args(arguments).output.write_text(picture(), "utf-8")


if __name__ == "__main__":
    main()
