"""Names on a hub: this disk first, one attempt where no hub answers, and the hub where it does."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, complaint, make_home, worked
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from torchprune.cli import hub
from torchprune.cli.hub import fetched
from torchprune.errors import InputError

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every connection that is tried, none of which succeeds; nobody waits before another."""
    tried: list[Any] = []

    def refuse(address: Any, *_: Any, **__: Any) -> Any:
        tried.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    def no_sleep(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(time, "sleep", no_sleep)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub._unreachable.cache_clear()
    yield tried
    hub._unreachable.cache_clear()


def keep(cache: Path, name: str, files: list[Path]) -> None:
    """Files as `from_pretrained` leaves them in the hub's cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, "utf-8")
    for file in files:
        (snapshot / file.name).write_bytes(file.read_bytes())


# -- the commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "nobody/nothing", *SMALL, "--output", "out"),
        ("eval", "nobody/nothing", "--text", "text.txt"),
        ("export", "nobody/nothing", "--to", "hf", "--output", "out"),
        ("eval", "model", "--text", "text.txt", "--tokenizer", "nobody/nothing"),
        ("eval", "model", "--text", "nobody/nothing:en"),
    ],
    ids=["prune", "eval", "export", "tokenizer", "dataset"],
)
def test_an_unreachable_hub_is_one_attempt_and_one_line(home, monkeypatch, attempts, command):
    monkeypatch.chdir(home)
    said = complaint(*command)
    assert "it is not on this disk, and the hub cannot be reached" in said
    assert "Connection refused" in said
    assert len(attempts) == 1


def test_a_name_in_the_cache_asks_nobody(home, tmp_path, monkeypatch, attempts):
    monkeypatch.chdir(home)
    keep(tmp_path / "cache", "some/model", list((home / "model").iterdir()))
    of_name, of_directory = (
        json.loads(worked("eval", name, "--text", "text.txt", "--json"))
        for name in ("some/model", "model")
    )
    assert of_name == of_directory
    assert attempts == []


def test_a_tokenizer_that_is_not_needed_is_asked_for_once(home, tmp_path, monkeypatch, attempts):
    monkeypatch.chdir(home)
    files = [f for f in (home / "model").iterdir() if "token" not in f.name]
    keep(tmp_path / "cache", "some/model", files)
    worked("prune", "some/model", "--method", "magnitude", "--output", tmp_path / "out")
    assert len(attempts) <= 1


def test_what_is_wrong_with_a_cached_model_is_said(home, tmp_path, monkeypatch, attempts):
    """And not that it is missing."""
    monkeypatch.chdir(home)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}', "utf-8")
    keep(tmp_path / "cache", "some/model", [tmp_path / "config.json"])
    said = complaint("eval", "some/model", "--text", "text.txt")
    assert "does not recognize this architecture" in said
    assert "not on this disk" not in said


# -- the order -------------------------------------------------------------------------------------


class Reader:
    """Reads a name with the hub or without, and notes which."""

    def __init__(self, *results: Any) -> None:
        self.results, self.offline = list(results), list[bool]()

    def __call__(self) -> Any:
        self.offline.append(constants.is_offline_mode())
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


MISSING = LocalEntryNotFoundError("not in the cache")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_unreachable", lambda: "")


@pytest.mark.parametrize("wrong", [MISSING, ValueError("half a file")])
def test_what_is_not_whole_here_comes_from_the_hub(answering, wrong):
    reader = Reader(wrong, "from the hub")
    assert fetched("some/name", reader) == "from the hub"
    assert reader.offline == [True, False]


def test_what_is_here_is_read_here(answering):
    reader = Reader("from the cache")
    assert fetched("some/name", reader) == "from the cache"
    assert reader.offline == [True]
    assert not constants.is_offline_mode()


def test_directories_are_read_as_they_are(answering, tmp_path):
    reader = Reader("a directory")
    assert fetched(str(tmp_path), reader) == "a directory"
    assert reader.offline == [False]


def test_the_error_of_the_hub_is_the_one_that_is_raised(answering):
    with pytest.raises(OSError, match="no such repository"):
        fetched("some/name", Reader(MISSING, OSError("no such repository")))


def test_a_missing_name_and_no_hub(monkeypatch):
    monkeypatch.setattr(hub, "_unreachable", lambda: "nobody answers")
    wrapped = OSError("cannot find it")
    wrapped.__cause__ = MISSING
    for error in (MISSING, wrapped):
        with pytest.raises(InputError, match="it is not on this disk, and nobody answers"):
            fetched("some/name", Reader(error))
    with pytest.raises(ValueError, match="half a file"):
        fetched("some/name", Reader(ValueError("half a file")))


def test_a_user_who_is_offline_is_told_so(monkeypatch, attempts):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE keeps the hub from being asked"):
        fetched("some/name", Reader(MISSING))
    assert attempts == []
    assert constants.is_offline_mode()
