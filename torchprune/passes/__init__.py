"""Graph passes over `torch.export` programs: masks put in, folded, packed; what is dead taken out.

Each takes an ExportedProgram and returns a `Passed` with a new one. The given program, and the
module that it was exported from, whose tensors it shares, are left as they are.

>>> import torch, torchprune
>>> from torchprune import passes
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
>>> program = torch.export.export(model, (torch.randn(2, 64),))
>>> masks = {"0.weight": torch.rand(64, 64) < 0.5}
>>> masked = passes.insert_masks(program, masks)
>>> print(passes.fold_masks(masked.program))
fold_masks: 1 changed (0.weight)
"""

from torchprune.passes.cleanup import strip_dead
from torchprune.passes.masks import fold_masks, insert_masks
from torchprune.passes.pack_linears import pack_linears
from torchprune.passes.program import Passed

__all__ = ["Passed", "fold_masks", "insert_masks", "pack_linears", "strip_dead"]
