"""Models compared and evaluated; imports `sparsify` and what stands below it."""
