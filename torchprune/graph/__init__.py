"""Which axes of a model's weights go together, read off its graph; imports `masking` and what
stands below it."""
