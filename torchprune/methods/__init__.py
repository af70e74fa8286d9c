"""Scores and solvers, pure functions of tensors, and the files that choose among them; imports
`reports`, `calibration` and what stands below them."""
