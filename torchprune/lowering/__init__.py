"""Forms of sparse weights that a processor is fast with; imports `masking` and what stands below
it."""
