"""Hypothesis strategies for weights, patterns, specs and small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchprune.errors import MissingExtraError
from torchprune.methods.admm import ADMMSpec
from torchprune.methods.magnitude import MagnitudeSpec
from torchprune.methods.ria import RIASpec
from torchprune.methods.sparsegpt import SparseGPTSpec
from torchprune.methods.wanda import WandaSpec
from torchprune.specs.options import PCG, Swaps
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured
from torchprune.specs.spec import Spec

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

METHODS = (MagnitudeSpec, WandaSpec, RIASpec, SparseGPTSpec, ADMMSpec)
KINDS = ("mlp", "cnn", "attention")


def weights(
    *,
    rows: tuple[int, int] = (1, 8),
    cols: tuple[int, int] = (1, 24),
    multiple_of: tuple[int, int] = (1, 1),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    finite: bool = True,
) -> SearchStrategy[Tensor]:
    """Matrices (rows, cols) that try a pruner: ties, zeros of both signs, subnormals, all equal.

    Args:
        rows, cols: least and greatest number of each.
        multiple_of: what rows and cols are multiples of, for patterns that need it.
        dtypes: floating dtypes to choose from.
        finite: leave out infinities; NaN is always left out.
    """
    _need_hypothesis("weights")
    from hypothesis import strategies as st

    special = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-130, *([] if finite else [float("inf")])]

    @st.composite
    def matrices(draw: DrawFn) -> Tensor:
        dtype = draw(st.sampled_from(list(dtypes)))
        shape = [
            each * draw(st.integers(-(-low // each), max(-(-low // each), high // each)))
            for (low, high), each in zip((rows, cols), multiple_of, strict=True)
        ]
        how = draw(st.sampled_from(["normal", "special", "equal"]))
        if how == "normal":
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
            return torch.randn(shape, generator=generator).to(dtype)
        if how == "equal":
            return torch.full(shape, draw(st.sampled_from(special))).to(dtype)
        count = shape[0] * shape[1]
        values = draw(st.lists(st.sampled_from(special), min_size=count, max_size=count))
        return torch.tensor(values).reshape(shape).to(dtype)

    return matrices()


def patterns(*, fits: tuple[int, int] | None = None) -> SearchStrategy[Pattern]:
    """Unstructured, n:m and block patterns.

    Args:
        fits: (rows, cols) the patterns must divide; None for any of usual size.
    """
    _need_hypothesis("patterns")
    from hypothesis import strategies as st

    rows, cols = fits or (16, 16)
    groups = [m for m in (2, 4, 8, 16) if cols % m == 0]
    tall = [r for r in (1, 2, 4, 8) if rows % r == 0]
    wide = [c for c in (1, 2, 4, 8) if cols % c == 0]
    found: list[SearchStrategy[Pattern]] = [
        st.just(Unstructured()),
        st.builds(Block, st.sampled_from(tall), st.sampled_from(wide)),
    ]
    if groups:
        pairs = [NM(n, m) for m in groups for n in range(1, m)]
        found.append(st.sampled_from(pairs))
    return st.one_of(found)


def specs(
    *,
    methods: Iterable[str] | None = None,
    fits: tuple[int, int] | None = None,
    scopes: Iterable[str] | None = None,
) -> SearchStrategy[Spec]:
    """Specs of every method, pattern, sparsity, scope and sequence that go together.

    Args:
        methods: "magnitude", "wanda", "ria", "sparsegpt", "admm"; None for all.
        fits: (rows, cols) that patterns must divide; None for any of usual size.
        scopes: only these; None for all that a method offers.
    """
    _need_hypothesis("specs")
    from hypothesis import strategies as st

    offered = {c.method: c for c in METHODS}
    classes = [offered[method] for method in methods or offered]
    allowed = None if scopes is None else set(scopes)

    @st.composite
    def some(draw: DrawFn) -> Spec:
        kind = draw(st.sampled_from(classes))
        pattern = draw(patterns(fits=fits))
        grouped = isinstance(pattern, NM)
        usable = [s for s in kind.scopes if allowed is None or s in allowed]
        scope = draw(st.sampled_from([s for s in usable if not (grouped and s == "global")]))
        options: dict[str, Any] = {"pattern": pattern, "scope": scope}
        if not grouped:
            options["sparsity"] = draw(st.integers(0, 99)) / 100
        if scope != "global" or kind is MagnitudeSpec:
            swaps = [] if kind.chooses_weights or isinstance(pattern, Block) else [Swaps(3)]
            options["refine"] = draw(st.sampled_from([None, None, PCG(3), *swaps]))
        if kind is not MagnitudeSpec and scope != "global":
            options["sequential"] = draw(st.sampled_from(["layer", "block", "none"]))
        changes = kind.chooses_weights or isinstance(options.get("refine"), PCG)
        if changes and options.get("sequential", "layer") == "layer":
            options["alpha"] = draw(st.sampled_from([0.0, 0.5]))
        if kind is SparseGPTSpec:
            options["block_size"] = draw(st.sampled_from([4, 16, 128]))
        spec: Spec = kind(**options)
        return spec

    return some()


@dataclass(frozen=True)
class SmallModel:
    """A tiny model that can be made again and again, and its calibration data.

    Attributes:
        kind: "mlp", "cnn" or "attention".
        make: builds the module, with the same weights each time, in eval mode.
        data: a few batches for it.
        fits: (rows, cols) such that a pattern dividing them divides every layer.
    """

    kind: str
    make: Callable[[], nn.Module]
    data: list[Tensor]
    fits: tuple[int, int]


def small_models(
    *,
    kinds: Iterable[str] = KINDS,
    multiple_of: int = 8,
    batches: tuple[int, int] = (1, 3),
) -> SearchStrategy[SmallModel]:
    """Tiny models with their data: a plain MLP, a CNN with groups, an attention block.

    Args:
        kinds: "mlp", "cnn", "attention".
        multiple_of: what every layer's outputs and inputs (a group's, for convolutions) are a
            multiple of.
        batches: least and greatest number of calibration batches.
    """
    _need_hypothesis("small_models")
    from hypothesis import strategies as st

    builders = {"mlp": _mlp, "cnn": _cnn, "attention": _attention}
    shapes = {"mlp": (6,), "cnn": (2,), "attention": (2, 5)}
    chosen = list(kinds)

    @st.composite
    def some(draw: DrawFn) -> SmallModel:
        kind, seed = draw(st.sampled_from(chosen)), draw(st.integers(0, 2**32 - 1))
        wide = draw(st.integers(1, 2))

        def make() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return builders[kind](multiple_of, wide).eval()

        generator = torch.Generator().manual_seed(seed)
        tail = (2 * multiple_of, 5, 5) if kind == "cnn" else (multiple_of,)
        data = [
            torch.randn(*shapes[kind], *tail, generator=generator)
            for _ in range(draw(st.integers(*batches)))
        ]
        return SmallModel(kind, make, data, (multiple_of, multiple_of))

    return some()


def _mlp(unit: int, wide: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(unit, wide * unit), nn.GELU(), nn.Linear(wide * unit, unit, bias=False)
    )


def _cnn(unit: int, wide: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2 * unit, 2 * unit * wide, 3, padding=1, groups=2),
        nn.BatchNorm2d(2 * unit * wide),
        nn.ReLU(),
        nn.Conv2d(2 * unit * wide, unit, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(unit, unit),
    )


def _attention(unit: int, wide: int) -> nn.Module:
    return nn.Sequential(_Attention(unit), nn.Linear(unit, wide * unit))


class _Attention(nn.Module):
    """One head of causal self-attention between a norm and a residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), is_causal=True)
        out: Tensor = self.out(mixed)
        return x + out


def _need_hypothesis(name: str) -> None:
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        raise MissingExtraError("hypothesis", "testing", f"torchprune.testing.{name}") from None
