"""What happened to a model, as tables and figures; imports `calibration` and what stands below
it."""
