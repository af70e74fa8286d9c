"""Batches in lockstep through a model, what layers read, and what is kept of it; imports `masking`
and what stands below it."""
