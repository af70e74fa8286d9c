"""The pruning methods: pure functions on one layer's matrix and its statistics."""
