"""Tasks made of held-out Wikipedia: SmolLM2-135M dense, and half pruned by two methods.

    python benchmarks/study/wiki_tasks.py [--questions 150] [--texts 20] [--output DIR]

Three tasks of lm_eval are written as YAML and JSON lines into a temporary directory: the right last
word of a sentence among four of its article, the right next sentence (its first words) among four
of its article, and the likelihood of paragraphs. Each pruned model is compared with the dense one
on the same examples. What is in DIR already is not measured again.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

import torchprune
from torchprune import MagnitudeSpec, WandaSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import smollm2

CHOICES = 4
EACH = 4
"""Questions of a kind that an article gives."""

SPECS = {"magnitude 50 %": MagnitudeSpec(sparsity=0.5), "Wanda 50 %": WandaSpec(sparsity=0.5)}

CHOOSING = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
READING = """\
task: paragraphs
dataset_path: json
dataset_kwargs:
  data_files:
    test: paragraphs.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    higher_is_better: false
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens, for calibration")
    parser.add_argument("--output", type=Path, default=Path("evaluate"))
    options = parser.parse_args()
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    tokenizer = smollm2.load_tokenizer()
    batches = list(smollm2.windows(tokenizer, calibration, options.windows, 256, seed=0).split(1))
    with tempfile.TemporaryDirectory() as folder:
        names = write_tasks(Path(folder), held_out, options.questions, options.texts)
        dense = options.output / "dense.json"
        common = {"tokenizer": tokenizer, "task_path": folder, "progress": False, "batch_size": 16}
        seconds = time.process_time()
        torchprune.evaluate(smollm2.load_model(), names, path=dense, **common)
        for label, spec in SPECS.items():
            model = smollm2.load_model()
            torchprune.sparsify(model, spec, batches if spec.needs_data else None, progress=False)
            kept = options.output / f"{label.split()[0].lower()}.json"
            found = torchprune.evaluate(model, names, against=dense, path=kept, **common)
            print(f"\n{label}\n\n{found.to_markdown()}", flush=True)
        print(f"\n{time.process_time() - seconds:.0f} s of processor time, {torch.__version__}")


def write_tasks(folder: Path, articles: list[str], questions: int, texts: int) -> list[str]:
    """The tasks' names; some questions an article, whose sentences are the wrong answers too."""
    draw = random.Random(0)
    words, nexts, paragraphs = [], [], []
    for article in articles:
        sentences = [s for s in sentences_of(article) if 8 <= len(s.split()) <= 24]
        if len(sentences) < 3 * EACH:
            continue
        lasts = sorted({s.split()[-1] for s in sentences})
        for sentence in draw.sample(sentences, EACH):
            *start, last = sentence.split()
            others = draw.sample([word for word in lasts if word != last], CHOICES - 1)
            words.append(question(" ".join(start), last, others, draw))
        for place in draw.sample(range(len(sentences) - 1), EACH):
            far = [s for i, s in enumerate(sentences) if i not in (place, place + 1)]
            answers = (sentences[place + 1], *draw.sample(far, CHOICES - 1))
            right, *wrong = (" ".join(s.split()[:7]) for s in answers)
            if right not in wrong:
                nexts.append(question(sentences[place], right, wrong, draw))
        paragraphs.append({"text": ". ".join(sentences[:4])})
    draw.shuffle(words)
    draw.shuffle(nexts)
    tasks = {"last_word": words[:questions], "next_sentence": nexts[:questions]}
    for name, rows in tasks.items():
        (folder / f"{name}.yaml").write_text(CHOOSING.format(name=name), "utf-8")
        write(folder / f"{name}.jsonl", rows)
    (folder / "paragraphs.yaml").write_text(READING, "utf-8")
    write(folder / "paragraphs.jsonl", paragraphs[:texts])
    return [*tasks, "paragraphs"]


def sentences_of(article: str) -> list[str]:
    """Whole sentences of running text that end in a full stop after a word."""
    paragraphs = (p for p in article.split("\n") if len(p.split()) > 20)
    pieces = (s for p in paragraphs for s in re.split(r"(?<=[a-z]{2}\.) (?=[A-Z])", p))
    return [s.rstrip(".") for s in pieces if re.search(r"[a-z]{2}\.$", s)]


def question(start: str, right: str, wrong: list[str], draw: random.Random) -> dict[str, object]:
    """A row with the right answer at a random place."""
    choices = draw.sample([right, *wrong], CHOICES)
    return {"start": start, "choices": choices, "answer": choices.index(right)}


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
