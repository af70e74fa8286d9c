"""Models compared, evaluated and asked what pruning would cost; imports `sparsify` and what stands
below it."""
