"""Shared settings: hypothesis profiles, threads, third-party noise, the `gpu` marker."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "local",
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

_THIRD_PARTY_NOISE = (
    # torchao registers enums with torch the old way when transformers imports it.
    "ignore:.*KernelPreference.*:UserWarning",
    "ignore:.*ScaleCalculationMode.*:UserWarning",
    "ignore::DeprecationWarning:torchao.*",
    # Inductor's own import of torch.utils.mkldnn.
    "ignore:.*torch.jit.script_method.*:DeprecationWarning",
    # peft reads a property that transformers has renamed.
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    # SWIG's generated types (sentencepiece, among others) carry no module.
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in _THIRD_PARTY_NOISE:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)  # tiny models: more threads cost more than they give
    _keep_openvino_quiet()


def _keep_openvino_quiet() -> None:
    """Have OpenVINO not report its use over the network: it forks this many-threaded process."""
    if find_spec("openvino_telemetry"):
        from openvino_telemetry.backend.backend_ga4 import GA4Backend

        GA4Backend.send = lambda self, message: None


def pytest_collection_finish() -> None:
    """Libraries are a million objects, which the garbage collector need not look through again.

    A tenth of all time, and of what a Trainer does, which collects by itself, three quarters.
    """
    gc.set_threshold(100_000, 50, 100)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """Likewise what a module of tests imported."""
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graph that another test compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
