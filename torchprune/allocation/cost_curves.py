"""Costs at a few sparsities, read as a curve over all of them."""
