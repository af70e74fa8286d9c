"""The laws of pruning as assertions and hypothesis strategies, for anybody's test suite.

`assert_sparsity`, `assert_shrinks` and `check_laws` need torch alone. The strategies `weights`,
`patterns`, `specs` and `small_models` need hypothesis: pip install 'torchprune[testing]'.

>>> import torch, torchprune
>>> from torchprune.testing import assert_sparsity
>>> model = torchprune.sparsify(torch.nn.Linear(8, 4), torchprune.MagnitudeSpec(pattern="2:4"))
>>> assert_sparsity(model, "2:4")
"""

from torchprune.testing.assertions import assert_sparsity
from torchprune.testing.laws import check_laws
from torchprune.testing.removal import assert_shrinks
from torchprune.testing.strategies import SmallModel, patterns, small_models, specs, weights

__all__ = [
    "SmallModel",
    "assert_shrinks",
    "assert_sparsity",
    "check_laws",
    "patterns",
    "small_models",
    "specs",
    "weights",
]
