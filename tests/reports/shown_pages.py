"""Pages for tests: one with every kind of piece, and one with three hundred layers."""

from __future__ import annotations

import random

from torchprune.reports.pieces import (
    Bar,
    Bars,
    Code,
    Fact,
    Grid,
    Heat,
    Line,
    Lines,
    Page,
    Pair,
    Pairs,
    Prose,
    Section,
    Spot,
)
from torchprune.reports.tables import Column

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}\u2028\x00\ud800\u202e"


def every_piece(word: str = "plain", value: float = 0.25) -> Page:
    """A page in which `word` stands wherever a text may stand, and `value` where a number may."""
    bars = [
        Bar(f"model.layers.0.{word}", value, value - 0.1, value + 0.1, word),
        Bar("model.layers.1.up", 2.0, kind="up"),
        Bar("model.layers.2.up", -1.0, kind="up"),
    ]
    lines = [
        Line(word, [Spot(0.3, 14.0, 13.5, 14.5), Spot(0.5, value), Spot(0.7, 40.0)]),
        Line("2:4", [Spot(0.5, 20.0, 18.0, 23.0)], joined=False),
    ]
    grid = Grid(
        f"A table {word}",
        [Column("name", fold=True), Column(word, right=True)],
        [(word, "1,000"), ("b", "20"), ("c", "")],
        [(word, 1000.0), ("b", 20.0), ("c", None)],
    )
    heat = Heat(word, word, [word, "up"], ["0", word], [[value, None], [1e-3, 20.0]], True, word)
    section = Section(
        word,
        [
            Prose(word),
            grid,
            Bars(f"Bars {word}", word, bars, word),
            heat,
            Lines(word, word, word, lines, value, word, percent=True, logarithmic=True, note=word),
            Code(word, word, word),
            Pairs(word, [Pair(word, word, word)]),
        ],
        word,
    )
    facts = [Fact(word, word, word)]
    data = {word: [value, None, True, 3, {"deeper": word}], "tuple": (1, 2)}
    part = Page(f"part {word}", word, [section], facts, [], word, data)
    return Page(f"title {word}", word, [section], facts, [word], word, data, [part])


def many_layers(count: int = 43) -> Page:
    """A page like that of a model of `count` blocks, seven layers each."""
    draw = random.Random(0)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    values = [[10 ** draw.uniform(-4, -0.5) for _ in kinds] for _ in range(count)]
    bars = [
        Bar(f"model.layers.{i}.{kind}", v, 0.8 * v, 1.3 * v, kind)
        for i, row in enumerate(values)
        for kind, v in zip(kinds, row, strict=True)
    ]
    holes = [
        [None if (i + j) % 17 == 0 else v for j, v in enumerate(row)]
        for i, row in enumerate(values)
    ]
    rows = [(bar.name, f"{bar.value:.4f}") for bar in bars]
    raw = [(bar.name, bar.value) for bar in bars]
    columns = [Column("layer", fold=True), Column("error", right=True)]
    wide = [Column("first"), *(Column(f"column {i}", right=True) for i in range(14))]
    spots = [Spot(0.3, 14.0, 13.5, 14.5), Spot(0.5, 18.0, 17.0, 19.0), Spot(0.7, 60.0, 50.0, 77.0)]
    curve = Lines(
        "perplexity against sparsity",
        "sparsity",
        "perplexity",
        [Line("wanda", spots), Line("wanda 2:4", [Spot(0.5, 21.0)], joined=False)],
        level=12.1,
        logarithmic=True,
        percent=True,
    )
    return Page(
        "Pruning report: a model",
        "Half of the weights are zero.",
        [
            Section(
                "Error by layer",
                [
                    Bars("Every layer", "relative squared error", bars, "Less is better."),
                    Heat("By block", "error", kinds, [str(i) for i in range(count)], holes, True),
                ],
            ),
            Section("Quality", [curve]),
            Section("All layers", [Grid("Layers", columns, rows, raw)]),
            Section("Wide", [Grid("Wide table", wide, [["x", *map(str, range(14))]] * 3)]),
            Section("Texts", [Pairs("Both", [Pair("The capital", "is Paris", "is is is")])]),
        ],
        [Fact("zeros", "50.00 %", "of 106,168,320 weights")],
        ["covered 94 % of the blocks' weights"],
        'torchprune.sparsify(model, torchprune.WandaSpec(pattern="2:4"), batches)',
        {"total": {"sparsity": 0.5}, "worst": float("inf")},
    )
