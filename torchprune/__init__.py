"""torchprune: pruning for PyTorch as parametrizations.

>>> import torch, torchprune
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> model = torchprune.sparsify(model, torchprune.MagnitudeSpec(pattern="2:4"))
>>> torchprune.report(model).sparsity
0.5
>>> model = torchprune.fold(model)
"""

from typing import TYPE_CHECKING

from torchprune.process import is_the_command

if TYPE_CHECKING or not is_the_command():  # its help needs no torch; it imports what it runs
    from torchprune.calibration.text import text_batches
    from torchprune.checkpoint.migrate import migrate
    from torchprune.checkpoint.ordinary_saves import teach as _teach
    from torchprune.checkpoint.save_load import load, load_into, save
    from torchprune.errors import TorchpruneError
    from torchprune.lowering.kernels import operators as kernels  # noqa: F401  (kernels.native())
    from torchprune.lowering.lower import lift, lower, plan_lowering
    from torchprune.masking.mask import apply_masks, densify, fold, masks
    from torchprune.methods.admm import ADMMSpec
    from torchprune.methods.best import BestSpec
    from torchprune.methods.custom import ScoreSpec, SolverSpec
    from torchprune.methods.magnitude import MagnitudeSpec
    from torchprune.methods.ria import RIASpec
    from torchprune.methods.sparsegpt import SparseGPTSpec
    from torchprune.methods.wanda import WandaSpec
    from torchprune.reports.report import report
    from torchprune.sparsify import sparsify
    from torchprune.specs.allocation import OWL, LeastError, Search, Sensitivity
    from torchprune.specs.options import PCG, Reconstruct, Swaps
    from torchprune.specs.patterns import NM, Block, Unstructured
    from torchprune.structure.budget_spec import BudgetSpec
    from torchprune.structure.plan import plan_shrink
    from torchprune.structure.shrink import shrink
    from torchprune.structure.specs import ChannelSpec, HeadSpec, LayerSpec, NeuronSpec
    from torchprune.study.compare import compare
    from torchprune.study.costs.sensitivity import sensitivity
    from torchprune.study.results import Comparison
    from torchprune.study.speed.profile import profile
    from torchprune.study.tasks.evaluation import perplexity
    from torchprune.study.tasks.task_runs import evaluate
    from torchprune.training.iterate import prune_iteratively
    from torchprune.training.peft_lessons import teach_peft as _teach_peft
    from torchprune.training.pruner import Pruner
    from torchprune.training.ready import peft_ready
    from torchprune.training.recover import recover
    from torchprune.training.tickets import find_ticket

    _teach()  # transformers' own saves keep masks
    _teach_peft()  # and peft's adapters the zeros

__version__ = "0.1.0"

__all__ = [
    "NM",
    "OWL",
    "PCG",
    "ADMMSpec",
    "BestSpec",
    "Block",
    "BudgetSpec",
    "ChannelSpec",
    "Comparison",
    "HeadSpec",
    "LayerSpec",
    "LeastError",
    "MagnitudeSpec",
    "NeuronSpec",
    "Pruner",
    "RIASpec",
    "Reconstruct",
    "ScoreSpec",
    "Search",
    "Sensitivity",
    "SolverSpec",
    "SparseGPTSpec",
    "Swaps",
    "TorchpruneError",
    "Unstructured",
    "WandaSpec",
    "apply_masks",
    "compare",
    "densify",
    "evaluate",
    "find_ticket",
    "fold",
    "lift",
    "load",
    "load_into",
    "lower",
    "masks",
    "migrate",
    "peft_ready",
    "perplexity",
    "plan_lowering",
    "plan_shrink",
    "profile",
    "prune_iteratively",
    "recover",
    "report",
    "save",
    "sensitivity",
    "shrink",
    "sparsify",
    "text_batches",
]
