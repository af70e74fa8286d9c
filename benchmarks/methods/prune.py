"""Time, memory and quality of pruning SmolLM2-135M, against llm-compressor on the same machine.

    python benchmarks/methods/prune.py [--repeats 3] [--draws 1] [--quick] [--output FILE.json]

Every measurement is a fresh process: one plain forward pass over the calibration windows,
torchprune, and the peer in its own environment (``.venv-peer``, made when absent). All three
see the same 32 windows of 512 tokens, one at a time, on the same number of threads, and take
turns within one run, so that a busy machine hurts them alike. The clock covers the pruning alone.
Perplexity is that of held-out Wikipedia articles, by the usual protocol.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from peer import Job, Prune, Result, measure
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
PEER_ENVIRONMENT = ROOT / ".venv-peer"
PEER_REQUIREMENTS = ("torch==2.13.0", "llmcompressor==0.14.0.1")
CONTENDERS = ("forward", "ours", "peer")
LENGTH = 512


@dataclass(frozen=True)
class Run:
    """One measurement of one contender (forward, ours, peer)."""

    contender: str
    method: str
    pattern: str
    draw: int  # seed of the calibration windows
    repeat: int
    result: Result


# --- Our side, in a process of its own -----------------------------------------------------------


def forward(model: PreTrainedModel, calibration: Tensor) -> None:
    """What any calibration must do at the least: the model, once, over the windows."""
    with torch.no_grad():
        for row in calibration:
            model(row[None])


def prune_with_ours(job: Job) -> Prune:
    """Prune and fold, so that plain modules with zeros in their weights remain, as the peer's."""
    import torchprune

    specs = {
        "magnitude": torchprune.MagnitudeSpec,
        "wanda": torchprune.WandaSpec,
        "sparsegpt": torchprune.SparseGPTSpec,
    }
    share = {"sparsity": job.sparsity} if job.pattern == "unstructured" else {}
    spec = specs[job.method](pattern=job.pattern, **share)

    def prune(model: PreTrainedModel, calibration: Tensor) -> None:
        torchprune.sparsify(model, spec, [row[None] for row in calibration], progress=False)
        torchprune.fold(model)

    return prune


def work(job: Job) -> None:
    """Do one job of ours and print its result, a JSON line; all else goes to standard error."""
    answer, sys.stdout = sys.stdout, sys.stderr
    if job.method == "forward":
        result = measure(job, forward, {})
    else:
        sys.path.insert(0, str(ROOT))
        import torchprune

        result = measure(job, prune_with_ours(job), {"torchprune": torchprune.__version__})
    print(json.dumps(asdict(result)), file=answer)


# --- Processes -----------------------------------------------------------------------------------


def peer_python() -> Path:
    """The interpreter of the peer's environment, which is made when absent."""
    python = PEER_ENVIRONMENT / "bin" / "python"
    if not any(PEER_ENVIRONMENT.glob("lib/python*/site-packages/llmcompressor")):
        subprocess.run(["python3.11", "-m", "venv", str(PEER_ENVIRONMENT)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *PEER_REQUIREMENTS]
        subprocess.run(install, check=True)
    return python


def run(command: list[str], threads: int) -> Result:
    """The result that a worker printed.

    Threads sleep while they wait: with OpenMP's default they spin, and on a machine that others
    use too, processor seconds then measure the neighbours.
    """
    openmp = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    quiet = {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | openmp | quiet
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stderr[-4000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def measure_all(options: argparse.Namespace, job: Job, draws: list[str]) -> list[Run]:
    """Every contender, method and pattern, taking turns; ``draws`` are files of windows."""
    contenders = [name for name in CONTENDERS if name in options.contenders]
    here = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    there: list[str] = []
    if "peer" in contenders:
        there = [str(options.peer_python or peer_python()), str(ROOT / "benchmarks" / "peer.py")]
    cells = [
        (repeat, draw, method, pattern, contender)
        for repeat in range(options.repeats)
        for draw in range(len(draws))
        for method in options.methods
        for pattern in options.patterns
        for contender in contenders
    ]
    runs: list[Run] = []
    for repeat, draw, method, pattern, contender in tqdm(cells, disable=None):
        first = contender != "forward" or not runs
        task = replace(
            job,
            windows=draws[draw],
            method="forward" if contender == "forward" else method,
            pattern=pattern,
            evaluate=first and repeat == 0,  # it is the same in every repeat
        )
        command = [*(there if contender == "peer" else here), json.dumps(asdict(task))]
        result = run(command, job.threads)
        runs.append(Run(contender, method, pattern, draw, repeat, result))
    return runs


# --- Report --------------------------------------------------------------------------------------


def middle(values: Iterable[float | None]) -> float | None:
    """Median of those that were measured."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def text(value: float | None, form: str) -> str:
    """A cell of a table."""
    return "–" if value is None else format(value, form)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---" if column < 3 else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def measured(runs: list[Run]) -> str:
    """Medians of every contender."""
    rows = []
    for method, pattern, contender in dict.fromkeys(
        (run.method, run.pattern, run.contender) for run in runs
    ):
        same = [
            run.result
            for run in runs
            if (run.method, run.pattern, run.contender) == (method, pattern, contender)
        ]
        exact = {(r.zeros, r.weights) for r in same}
        share = median(zeros / weights for zeros, weights in exact)
        rows.append(
            [
                method,
                pattern,
                {"forward": "plain forward", "ours": "torchprune", "peer": "llm-compressor"}[
                    contender
                ],
                text(middle(r.processor_seconds for r in same), ".1f"),
                text(middle(r.wall_seconds for r in same), ".1f"),
                text(middle(r.peak_bytes / 2**20 for r in same), ".0f"),
                text(middle((r.peak_bytes - r.resident_bytes) / 2**20 for r in same), ".0f"),
                text(100 * share, ".4f"),
                text(middle(r.judged for r in same), ".3f"),
            ]
        )
    return table(
        [
            "method",
            "pattern",
            "",
            "processor s",
            "wall s",
            "peak MiB",
            "growth MiB",
            "zeros %",
            "perplexity",
        ],
        rows,
    )


def ratios(runs: list[Run]) -> str:
    """Medians of the ratios within each turn; below one, torchprune is better."""
    by_key = {(r.method, r.pattern, r.draw, r.repeat, r.contender): r.result for r in runs}
    turns = dict.fromkeys(key[:4] for key in by_key)

    def ratio(
        method: str, pattern: str, over: str, figure: Callable[[Result], float | None]
    ) -> str:
        values: list[float] = []
        for turn in turns:
            ours, other = by_key.get((*turn, "ours")), by_key.get((*turn, over))
            if turn[:2] != (method, pattern) or ours is None or other is None:
                continue
            above, below = figure(ours), figure(other)
            if above is not None and below:
                values.append(above / below)
        return text(middle(values), ".3f")

    rows = [
        [
            method,
            pattern,
            ratio(method, pattern, "peer", lambda r: r.processor_seconds),
            ratio(method, pattern, "peer", lambda r: r.wall_seconds),
            ratio(method, pattern, "forward", lambda r: r.processor_seconds),
            ratio(method, pattern, "peer", lambda r: r.peak_bytes),
            ratio(method, pattern, "peer", lambda r: r.peak_bytes - r.resident_bytes),
            ratio(method, pattern, "peer", lambda r: r.judged),
        ]
        for method, pattern in dict.fromkeys(turn[:2] for turn in turns)
    ]
    return table(
        [
            "method",
            "pattern",
            "processor ours/peer",
            "wall ours/peer",
            "processor ours/forward",
            "peak ours/peer",
            "growth ours/peer",
            "perplexity ours/peer",
        ],
        rows,
    )


def machine() -> str:
    """Processor model and number of cores."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return f"{name}, {os.cpu_count()} cores"


def versions(runs: list[Run]) -> dict[str, dict[str, str]]:
    """Package versions per contender."""
    return {run.contender: run.result.versions for run in runs}


def report(runs: list[Run], shape: tuple[int, int, int]) -> str:
    """Everything as Markdown; ``shape`` is windows of calibration, of evaluation, and length."""
    listed = "; ".join(
        f"{contender}: " + ", ".join(f"{name} {number}" for name, number in numbers.items())
        for contender, numbers in versions(runs).items()
    )
    calibration, evaluation, length = shape
    dense = next((r.result for r in runs if r.contender == "forward" and r.repeat == 0), None)
    lines = [
        f"SmolLM2-135M-Instruct, float32, {calibration} calibration windows and {evaluation} "
        f"evaluation windows of {length} tokens of different Wikipedia articles.",
        f"Machine: {machine()}. {listed}.",
        f"Dense perplexity: {text(dense.judged if dense else None, '.3f')}.",
    ]
    return "\n\n".join(["\n".join(lines), measured(runs), ratios(runs)]) + "\n"


# --- Command line --------------------------------------------------------------------------------


def draw_windows(directory: Path, draws: int, calibration: int, evaluation: int) -> list[str]:
    """A safetensors file for each draw: (windows, 512) int64 "calibration" and "evaluation"."""
    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    tokenizer = smollm2.load_tokenizer()
    seen, held_out = smollm2.split(smollm2.wikipedia_articles())
    judged = smollm2.consecutive_windows(tokenizer, held_out, LENGTH)
    spread = torch.linspace(0, len(judged) - 1, evaluation).long()  # over all held-out articles
    paths = [str(directory / f"{draw}.safetensors") for draw in range(draws)]
    for draw, path in enumerate(paths):
        drawn = smollm2.windows(tokenizer, seen, calibration, LENGTH, seed=draw)
        save_file({"calibration": drawn, "evaluation": judged[spread]}, path)
    return paths


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list of known names."""
    allowed = list(known)

    def parse(given: str) -> list[str]:
        chosen = given.split(",")
        if strangers := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{strangers} not among {allowed}")
        return chosen

    return parse


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="times that everything is measured")
    add("--draws", type=int, default=1, help="different calibration windows")
    add("--methods", type=names(("wanda", "sparsegpt")), default=["wanda", "sparsegpt"])
    add("--patterns", type=names(("unstructured", "2:4")), default=["unstructured", "2:4"])
    add("--contenders", type=names(CONTENDERS), default=list(CONTENDERS))
    add("--quick", action="store_true", help="once, 4 calibration and 4 evaluation windows")
    add("--evaluation", type=int, default=64, help="windows for perplexity")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--peer-python", type=Path, help="interpreter that has the peer (default: .venv-peer)")
    add("--output", type=Path, default=ROOT / "artifacts" / "prune.json", help=".md goes beside")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the raw runs as JSON with the Markdown beside it."""
    options = parse_options()
    if options.worker:
        work(Job(**json.loads(options.worker)))
        return
    calibration, evaluation = (4, 4) if options.quick else (32, options.evaluation)
    options.repeats = 1 if options.quick else options.repeats

    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    job = Job(str(smollm2.model_directory()), "", "", threads=options.threads)
    with tempfile.TemporaryDirectory() as directory:
        draws = draw_windows(Path(directory), options.draws, calibration, evaluation)
        runs = measure_all(options, job, draws)

    markdown = report(runs, (calibration, evaluation, LENGTH))
    print(markdown)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    raw = {"machine": machine(), "threads": options.threads, "runs": [asdict(r) for r in runs]}
    options.output.write_text(json.dumps(raw, indent=1) + "\n", "utf-8")
    options.output.with_suffix(".md").write_text(markdown, "utf-8")


if __name__ == "__main__":
    main()
