"""Connected components of graphs given as pairs of nodes."""

from __future__ import annotations

import torch
from torch import Tensor


def components(count: int, one: Tensor, two: Tensor) -> Tensor:
    """(count,) the smallest member of each node's connected component, from edges one[i]-two[i]."""
    parents = torch.arange(count)
    while True:
        low = torch.minimum(parents[one], parents[two])
        new = parents.scatter_reduce(0, parents[one], low, "amin")
        new = new.scatter_reduce(0, parents[two], low, "amin")
        while not torch.equal(jumped := new[new], new):
            new = jumped
        if torch.equal(new, parents):
            return parents
        parents = new
