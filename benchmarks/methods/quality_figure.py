"""The first page's table and picture, from the recorded runs of ``quality.py``.

    python benchmarks/methods/quality_figure.py   # writes docs/quality.svg, prints the table

Perplexity on held-out Wikipedia articles: SparseGPT and the three efforts of ``BestSpec``, means
over the draws. The picture is plain SVG without scripts or fonts of its own; it has a background
and follows the reader's light or dark mode.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from quality import BASE, GOALS, better

from torchprune.study.results import Comparison

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEXT = "Wikipedia"
METHODS = {
    BASE: "SparseGPT",
    "best, fast": "BestSpec, fast",
    "best, balanced": "BestSpec, balanced",
    "best, max": "BestSpec, max",
}

WIDTH, LEFT, RIGHT, TOP = 720, 64, 64, 74
BAR, BETWEEN = 15, 20
STYLE = """
  .paper { fill: #ffffff } .ink { fill: #1f2328 } .pale { fill: #59636e } .rule { stroke: #8c959f }
  .m0 { fill: #8c959f } .m1 { fill: #80b3f0 } .m2 { fill: #2f7fd8 } .m3 { fill: #0b4ea2 }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #f0f6fc } .pale { fill: #9198a1 }
    .rule { stroke: #656c76 }
    .m0 { fill: #656c76 } .m1 { fill: #1f5fa8 } .m2 { fill: #4493f8 } .m3 { fill: #a5d0ff }
  }
"""


def means(found: Comparison) -> dict[tuple[str, str], float]:
    """Mean perplexity of every method and goal that ran."""
    rows = [row for row in found.rows if row.error is None]
    keys = [(method, goal) for goal in GOALS for method in METHODS]
    values = {key: [r.metrics[TEXT] for r in rows if r.label == " | ".join(key)] for key in keys}
    return {key: fmean(some) for key, some in values.items() if some}


def table(found: Comparison) -> str:
    """Perplexities, and in parentheses the share of SparseGPT's loss that is left."""
    beside, mean = better(found), means(found)
    lines = [
        f"| goal (dense: {dense_of(found):.2f}) | {' | '.join(METHODS.values())} |",
        "| --- |" + " ---: |" * len(METHODS),
    ]
    for goal in GOALS:
        shares = beside.ratio(TEXT, f"base | {goal}")
        cells = []
        for method in METHODS:
            label, value = f"{method} | {goal}", mean.get((method, goal))
            left = "" if method == BASE or value is None else f" ({shares[label].mean:.2f})"
            cells.append("" if value is None else f"{value:.2f}{left}")
        lines.append(f"| {goal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def dense_of(found: Comparison) -> float:
    """The unpruned model's perplexity."""
    assert found.dense is not None
    return found.dense[TEXT]


def picture(found: Comparison) -> str:
    """Bars of perplexity, from the dense model's on."""
    dense, mean = dense_of(found), means(found)
    scale = (WIDTH - LEFT - RIGHT) / (max(mean.values()) - dense)
    body: list[str] = []
    y = TOP
    for goal in GOALS:
        present = [m for m in METHODS if (m, goal) in mean]
        middle = y + len(present) * BAR / 2 + 4
        body.append(
            f'<text class="ink" x="{LEFT - 10}" y="{middle}" text-anchor="end">{goal}</text>'
        )
        for method in present:
            value = mean[method, goal]
            long = (value - dense) * scale
            kind = list(METHODS).index(method)
            body.append(
                f'<rect class="m{kind}" x="{LEFT}" y="{y}" width="{long:.1f}" height="{BAR - 2}"/>'
            )
            body.append(
                f'<text class="pale" x="{LEFT + long + 6:.1f}" y="{y + 11}">{value:.2f}</text>'
            )
            y += BAR
        y += BETWEEN
    height = y - BETWEEN + 14
    key = []
    for kind, name in enumerate(METHODS.values()):
        x = LEFT + kind * 158
        key.append(f'<rect class="m{kind}" x="{x}" y="42" width="12" height="12"/>')
        key.append(f'<text class="ink" x="{x + 18}" y="53">{name}</text>')
    title = f"Perplexity of SmolLM2-135M, lower is better; bars begin at the dense {dense:.2f}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
            f'<text class="ink" x="{LEFT}" y="24">{title}</text>',
            *key,
            f'<line class="rule" x1="{LEFT}" y1="{TOP - 6}" x2="{LEFT}" y2="{height - 8}"/>',
            *body,
            "</svg>\n",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=HERE / "quality.json")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "quality.svg")
    options = parser.parse_args(arguments)
    found = Comparison.from_json(options.runs.read_text("utf-8"))
    options.output.write_text(picture(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
