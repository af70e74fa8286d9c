"""Ways to prune one model side by side; imports `sparsify` and what stands below it."""
