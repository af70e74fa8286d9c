"""The command line on a tiny model: the round trip, and every mistake a user can make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import SMALL, TEXT, call, complaint, make_home, worked
from safetensors.torch import load_file, save_file
from tiny_lm import WORDS
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import torchprune
from torchprune.calibration.text import draw_windows, some_documents
from torchprune.cli.app import app
from torchprune.cli.documents import looks_like_path, read_documents
from torchprune.cli.registry import prose


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("cli"))


def nowhere(tmp_path: Path) -> tuple[str, Path]:
    return "--output", tmp_path / "out"


# -- what works ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_prune_inspect_eval(home, tmp_path, method, pattern):
    out, text = tmp_path / "out", home / "text.txt"
    said = worked(
        *("prune", home / "model", "--method", method, "--pattern", pattern),
        *("--data", text, "--output", out, *SMALL),
    )
    assert "50.00%" in said
    assert f"saved weights and masks to {out}" in said

    report = json.loads(worked("inspect", out, "--json"))
    assert report["total"]["sparsity"] == 0.5
    assert len(report["layers"]) == 14
    assert {layer["method"] for layer in report["layers"]} == {method}
    assert "50.00%" in worked("inspect", out)

    figures = json.loads(worked("eval", out, "--text", text, "--seqlen", "16", "--json"))
    expected = torchprune.perplexity(
        torchprune.load(out), [WORDS.index(w) + 1 for w in TEXT.split()], seqlen=16
    )
    assert figures["perplexity"] == expected.perplexity
    assert figures["windows"] == expected.windows
    assert worked("eval", out, "--text", text, "--seqlen", "16", "-q") == f"{expected}\n"


def test_the_same_seed_gives_the_same_masks(home, tmp_path):
    def masks(name: str, *options: object) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        worked("prune", home / "model", "--data", home / "text.txt", "--output", out, *options)
        return torchprune.masks(torchprune.load(out))

    one, two = masks("one", *SMALL), masks("two", *SMALL)
    other = masks("other", *SMALL, "--seed", "5")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_without_data_the_model_writes_its_own(home, tmp_path):
    said = worked("prune", home / "model", "--output", tmp_path / "out", *SMALL)
    assert "3 windows of 16 tokens of the model itself" in said
    notes = json.loads(worked("inspect", tmp_path / "out", "--json"))["notes"]
    assert "calibrated on 3 windows of 16 tokens sampled from the model itself" in notes


def test_json_lines_are_as_good_as_text(home):
    texts = (home / "text.txt", home / "text.jsonl")
    one, two = (json.loads(worked("eval", home / "model", "--text", t, "--json")) for t in texts)
    assert one == two
    assert one["seqlen"] == 32


def test_a_local_dataset(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "validation.jsonl").write_text((home / "text.jsonl").read_text("utf-8"), "utf-8")
    documents = read_documents(f"{rows}::validation")
    assert documents == read_documents(str(home / "text.jsonl"))


def test_goals_of_single_layers(home, tmp_path):
    out = tmp_path / "out"
    worked(
        *("prune", home / "model", "--method", "magnitude", "--sparsity", "0.25", "--output", out),
        *("--ignore", "*.q_proj", "--target", "*.self_attn.*", "--target", "*.mlp.*"),
        *("--override", "*.k_proj=2:4", "--override", "*.v_proj=0.75"),
        *("--override", "*.o_proj=dense", "--override", "*.down_proj=block:4x4,0.5"),
    )
    layers = json.loads(worked("inspect", out, "--json"))["layers"]
    found = {y["name"].split(".")[-1]: (y["pattern"], y["zeros"] / y["size"]) for y in layers}
    assert found == {
        "k_proj": ("2:4", 0.5),
        "v_proj": ("unstructured 0.75", 0.75),
        "gate_proj": ("unstructured 0.25", 0.25),
        "up_proj": ("unstructured 0.25", 0.25),
        "down_proj": ("block:4x4 0.5", 0.5),
    }


def test_a_global_scope_meets_the_whole_budget(home, tmp_path):
    out = tmp_path / "out"
    worked("prune", home / "model", "--method", "magnitude", "--scope", "global", "--output", out)
    report = json.loads(worked("inspect", out, "--json"))
    assert report["total"]["sparsity"] == 0.5
    assert len({y["zeros"] / y["size"] for y in report["layers"]}) > 1


def test_the_transformers_directory_is_the_same_model(home, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    worked(
        *("prune", home / "model", "--pattern", "2:4", "--data", home / "text.txt", *SMALL),
        *("--output", out, "--hf", plain),
    )
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected = torchprune.load(out)(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(plain)(ids).logits, expected)
    text = ("--text", home / "text.txt", "--json")
    assert worked("eval", plain, *text) == worked("eval", out, *text)


def test_the_default_directory_is_named_after_the_work(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worked("prune", home / "model", "--method", "magnitude", "--pattern", "2:4")
    worked("prune", home / "model", "--method", "magnitude", "--sparsity", "0.3")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model-magnitude-2of4", "model-magnitude-unstructured-0.3"}


def test_an_earlier_save_is_replaced(home, tmp_path):
    out = tmp_path / "out"
    for sparsity in (0.25, 0.75):
        command = ("prune", home / "model", "--method", "magnitude", "--sparsity", sparsity)
        worked(*command, "--output", out)
        assert torchprune.report(torchprune.load(out)).sparsity == sparsity


def test_pruning_goes_on_from_a_saved_model(home, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    worked("prune", home / "model", "--method", "magnitude", "--sparsity", "0.3", "--output", one)
    wanda = ("--sparsity", "0.6", "--scope", "layer", "--data", home / "text.txt", *SMALL)
    worked("prune", one, *wanda, "--output", two)
    before, after = (torchprune.masks(torchprune.load(d)) for d in (one, two))
    assert all(bool((before[k] | ~after[k]).all()) for k in before)  # no pruned weight came back


def test_other_dtypes(home, tmp_path):
    out = tmp_path / "out"
    magnitude = ("--method", "magnitude", "--output", out)
    worked("prune", home / "model", *magnitude, "--dtype", "bfloat16")
    assert {y["dtype"] for y in json.loads(worked("inspect", out, "--json"))["layers"]} == {
        "bfloat16"
    }
    worked("eval", out, "--text", home / "text.txt", "--dtype", "float32")


def test_quiet_says_only_results(home, tmp_path):
    out = tmp_path / "out"
    said = worked("prune", home / "model", *SMALL, "--output", out, "--quiet")
    assert said == f"{torchprune.report(torchprune.load(out))}\n"


def test_magnitude_says_that_it_reads_no_data(home, tmp_path):
    magnitude = ("--method", "magnitude", "--data", "absent.txt", *nowhere(tmp_path))
    assert "absent.txt is not read" in worked("prune", home / "model", *magnitude)


def test_only_some_windows(home):
    text = ("--text", home / "text.txt", "--seqlen", "16", "--json")
    assert json.loads(worked("eval", home / "model", *text, "--windows", "4"))["windows"] == 4


def test_windows_are_cut_to_the_context(home, tmp_path):
    data = ("--data", home / "text.txt", "--samples", "2", *nowhere(tmp_path))
    assert "2 windows of 32 tokens" in worked("prune", home / "model", *data)


@pytest.mark.parametrize("command", [(), ("prune",), ("eval",), ("inspect",)])
def test_help_teaches(command):
    said = worked(*command, "--help")
    assert "torchprune inspect smol-2of4" in said or "Examples" in said


def test_help_wraps_where_the_terminal_ends():
    text = "One line.\n\nTwo lines that\n--are one paragraph.\n\n  as it\n  stands"
    assert prose(text) == "One line.\n\nTwo lines that --are one paragraph.\n\n  as it\n  stands"
    for command in app.registered_commands:
        assert all(p.startswith(" ") or "\n" not in p for p in (command.help or "").split("\n\n"))


def test_the_version():
    assert worked("--version").split() == ["torchprune", torchprune.__version__]


# -- what is wrong with the input: one line, exit code 1 -------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pattern", "2;4"), "pattern '2;4' is not understood"),
        (("--pattern", "2:4", "--sparsity", "0.7"), "contradicts pattern 2:4"),
        (("--pattern", "2:5"), "input width divisible by 5"),
        (("--sparsity", "50"), "0 <= sparsity < 1"),
        (("--scope", "column"), "scope 'column' is not offered"),
        (("--target", "*.q_prj"), "matches none of the model's"),
        (("--ignore", "re:("), "not a valid regular expression"),
        (("--override", "*.q_proj=3:1"), "0 < n < m is needed"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--data", "absent.txt"), "no such file: absent.txt"),
        (("--data", "./absent"), "no such file: ./absent"),
    ],
)
def test_prune_refuses(home, tmp_path, options, message):
    out = tmp_path / "out"
    assert message in complaint("prune", home / "model", *SMALL, "--output", out, *options)
    assert not out.exists()


def test_output_that_would_overwrite_is_refused_before_the_work(home, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    for name in (tmp_path, tmp_path / "mine.txt"):
        for option in ("--output", "--hf"):
            said = complaint("prune", home / "model", option, name)
            assert (
                f"{name} exists and is no empty directory" in said
                or "is a file; name a directory" in said
            )
    assert (tmp_path / "mine.txt").read_text("utf-8") == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "holds no text"),
        ("short.txt", b"w1 w2", "the text has 2 tokens, a window needs 16"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("broken.jsonl", b'{"text": "w1"}\n{"text', "line 2 is no JSON"),
        ("list.jsonl", b"[1]", "line 1 is a list, not an object"),
        ("other.jsonl", b'{"texts": "w1"}', "has no column 'text' (did you mean 'texts'?"),
        ("number.jsonl", b'{"text": 3}', "'text' is a int, not text"),
    ],
)
def test_bad_text_is_refused(home, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    data = ("--data", tmp_path / name, *nowhere(tmp_path))
    assert message in complaint("prune", home / "model", *SMALL, *data)


def test_eval_refuses(home, tmp_path):
    model, text = home / "model", home / "text.txt"
    assert "no such file: no.txt" in complaint("eval", model, "--text", "no.txt")
    assert "no such directory: ./no" in complaint("eval", "./no", "--text", text)
    assert "longer than the model's context" in complaint(
        *("eval", model, "--text", text, "--seqlen", "64")
    )
    (tmp_path / "short.txt").write_text("w1 w2", "utf-8")
    short = ("--text", tmp_path / "short.txt", "--seqlen", "8")
    assert "2 tokens, one window needs 8" in complaint("eval", model, *short)
    assert "no column 'body'" in complaint(
        *("eval", model, "--text", home / "text.jsonl", "--column", "body")
    )


def test_directories_that_hold_no_model(home, tmp_path):
    text = ("--text", home / "text.txt")
    assert "holds no model: neither" in complaint("eval", tmp_path, *text)
    assert "no such directory" in complaint("inspect", tmp_path / "absent")
    (tmp_path / "manifest.json").write_text('{"format": "torchprune", "version": 99}', "utf-8")
    assert "version 99" in complaint("inspect", tmp_path)
    assert "version 99" in complaint("eval", tmp_path, *text)


def test_a_model_without_tokenizer(home, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    model.save_pretrained(tmp_path / "bare")
    text = ("--text", home / "text.txt")
    assert "holds no tokenizer" in complaint("eval", tmp_path / "bare", *text)
    worked("eval", tmp_path / "bare", *text, "--tokenizer", home / "model")
    worked("prune", tmp_path / "bare", "--method", "magnitude", "--output", tmp_path / "out")


# -- wrong usage: exit code 2 ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune",),
        ("prune", "model", "--method", "wandaa"),
        ("prune", "model", "--samples", "0"),
        ("prune", "model", "--override", "*.q_proj"),
        ("prune", "model", "--override", "*.q_proj=2:4,half"),
        ("eval", "model"),
        ("polish",),
    ],
)
def test_wrong_usage(arguments):
    assert call(*arguments).exit_code == 2


# -- the program itself ----------------------------------------------------------------------------


def program(
    *arguments: object, code: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "torchprune"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )


def test_an_unreachable_hub_is_one_line_and_debug_shows_where(tmp_path):
    done = program("prune", "nobody/nothing", *nowhere(tmp_path))
    assert done.returncode == 1
    assert done.stdout == "loading nobody/nothing\n"
    assert done.stderr.startswith("error: cannot load nobody/nothing as a causal language model: ")
    assert done.stderr.count("\n") == 1

    done = program("prune", "nobody/nothing", "--debug", *nowhere(tmp_path))
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_an_unknown_dataset_is_one_line(home):
    done = program("eval", home / "model", "--text", "nobody/nothing:en")
    assert done.returncode == 1
    assert "is no file here and no dataset that can be loaded" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_typer_a_line_names_the_extra():
    done = program(code="import sys; sys.modules['typer'] = None; import torchprune.cli.app")
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'torchprune[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_imports_neither_transformers_nor_datasets():
    code = """
import sys
sys.argv = ["torchprune", "prune", "--help"]
from torchprune.cli.app import app
try:
    app()
finally:
    assert not {"transformers", "datasets"} & set(sys.modules)
"""
    done = program(code=code)
    assert done.returncode == 0, done.stderr


# -- text ------------------------------------------------------------------------------------------


def test_windows_reach_every_place():
    tokens = torch.arange(6)
    drawn = draw_windows(tokens, 200, 5, seed=0)
    assert drawn.shape == (200, 5)
    assert set(drawn[:, 0].tolist()) == {0, 1}
    assert torch.equal(draw_windows(tokens, 200, 5, seed=0), drawn)
    assert torch.equal(draw_windows(tokens, 1, 6, seed=3)[0], tokens)


def test_enough_documents_and_no_more():
    documents = ["a" * 10, "b" * 10, "c" * 10]
    some = some_documents(documents, 15, seed=0)
    assert sum(map(len, some)) == 15
    assert sorted(some_documents(documents, 1000, seed=1)) == documents


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", False),
        ("gpt2", False),
        ("HuggingFaceTB/SmolLM2-1.7B", False),
        ("./model", True),
        ("~/model", True),
        ("/models/a", True),
        ("a/b/c", True),
        ("notes.txt", True),
        ("data/notes.jsonl", True),
    ],
)
def test_what_can_only_be_a_path(name, is_path):
    assert looks_like_path(name) is is_path


# -- export ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(home: Path) -> Path:
    worked("prune", home / "model", "--method", "magnitude", "-q", "--output", home / "pruned")
    return home / "pruned"


def test_export_writes_onnx_that_computes_the_same(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    path = tmp_path / "model.onnx"
    done = program("export", pruned, "--to", "onnx", "--output", path, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["relative"] < 1e-4
    assert report["packed"] == []  # its weights are smaller than is worth packing
    assert report["bytes"] == path.stat().st_size
    assert "past_key_values.0.key" in report["inputs"]
    said = worked("export", pruned, "--to", "onnx", "-o", path, "--dense", "--no-cache")
    assert "inputs: input_ids\n" in said
    assert "0 weights packed" in said


def test_export_takes_a_bfloat16_checkpoint_as_it_is(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    half, path = tmp_path / "half", tmp_path / "m.onnx"
    worked(
        *("prune", home / "model", "--method", "magnitude", "-q"),
        *("--dtype", "bfloat16", "--output", half),
    )
    figures = json.loads(worked("export", half, "--to", "onnx", "--output", path, "--json"))
    assert figures["relative"] < 1e-5
    assert "The model is of bfloat16 and its graph of float32" in figures["brings"]


def test_export_writes_an_archive_and_int8(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    said = worked("export", pruned, "--to", "pt2", "--measure", "--output", path, "--json")
    measured = json.loads(said)["measured"]
    assert measured["bytes"] == path.stat().st_size
    assert measured["latency"]["median"] > 0
    assert len(measured["kernels"]["sparse"]) == len(json.loads(said)["packed"])
    figures = json.loads(said)
    assert figures["runtime"] == "the loaded program"
    assert figures["relative"] < 1e-3
    said = worked(
        "export", pruned, "--to", "onnx", "-o", tmp_path / "m.onnx", "--int8", "--no-cache",
        "--keep-float", "*.down_proj.*",
    )  # fmt: skip
    assert "int8 is what is faster" in said
    said = worked(
        "export", pruned, "--to", "openvino", "-o", tmp_path / "m.xml", "--int8", "--no-cache",
        "--samples", "2", "--length", "16",
    )  # fmt: skip
    assert "weights are in int8" in said
    assert "reads ranges from" in complaint(
        "export", pruned, "--to", "onnx", "-o", tmp_path / "n.onnx", "--data", "x.txt", code=2
    )
    assert "for --to onnx" in complaint(
        "export", pruned, "--to", "pt2", "-o", tmp_path / "x.pt2", "--int8", code=2
    )


def test_export_writes_a_plain_transformers_directory(pruned: Path, tmp_path: Path) -> None:
    assert worked("export", pruned, "--to", "hf", "--output", tmp_path / "hf").startswith("wrote ")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(6)[None]
    expected = torchprune.load(pruned)(tokens).logits
    assert torch.equal(plain(tokens).logits, expected)


def test_models_of_other_libraries_are_read(home: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.0.mlp.up_proj.weight_orig"] = weight
    tensors["model.layers.0.mlp.up_proj.weight_mask"] = (weight > 0).float()
    save_file(tensors, file, metadata={"format": "pt"})
    worked("export", tmp_path, "--to", "hf", "--output", tmp_path / "hf")
    plain = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(plain["model.layers.0.mlp.up_proj.weight"], weight * (weight > 0))


@pytest.mark.filterwarnings("ignore")  # of coremltools' making
def test_export_writes_core_ml_with_the_past_as_state(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="the extra coreml is not installed")
    path = tmp_path / "m.mlpackage"
    figures = json.loads(worked("export", pruned, "--to", "coreml", "--output", path, "--json"))
    assert figures["inputs"] == ["input_ids", "attention_mask", "position_ids"]
    assert figures["sizes"]["input_ids"] == [1, 1]
    said = worked("export", pruned, "--to", "coreml", "-o", path, "--no-cache", "--int8")
    assert "input_ids (1, a)" in said


def test_export_writes_an_encoder_decoder_as_two_graphs_or_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    torchprune.save(T5ForConditionalGeneration(config), tmp_path / "t5")
    call_of = ("export", tmp_path / "t5", "--to", "onnx", "--output")
    figures = json.loads(worked(*call_of, tmp_path / "two", "--json"))
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {f"{name}.onnx" for name in figures["parts"]}
    assert names == {"encoder_model.onnx", "decoder_model_merged.onnx"}
    assert "two graphs in a directory" in complaint(*call_of, tmp_path / "m.onnx")
    said = worked(*call_of, tmp_path / "m.onnx", "--no-cache")
    assert "inputs: input_ids, decoder_input_ids" in said
    assert "saved as one of .onnx" in complaint(*call_of, tmp_path / "no", "--no-cache")


def test_export_says_what_is_wrong(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    out = ("--to", "onnx", "--output", tmp_path / "m.onnx")
    assert "no such directory" in complaint("export", "./nowhere", *out)
    said = complaint("export", pruned, *out, "--dtype", "float16", "--int8")
    assert "all float32 or bfloat16, got torch.float16" in " ".join(said.split())
    assert call("export", pruned, "--to", "gguf", "--output", tmp_path / "x").exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "form"),
    [
        ("onnx", ".onnx"),
        ("pt2", ".pt2"),
        ("openvino", ".xml"),
        ("executorch", ".pte"),
        ("coreml", ".mlpackage"),
        ("aoti", ".pt2"),
    ],
)
def test_export_looks_at_the_suffix_before_anything_else(tmp_path, to, form):
    mine = tmp_path / "notes.txt"
    mine.write_text("mine", "utf-8")
    said = complaint("export", "./nowhere", "--to", to, "--output", mine)
    assert f"notes.txt: what {to} reads is saved as one of {form}" in said
    assert mine.read_text("utf-8") == "mine"
