"""How fast a model is in each form, what would be faster, and where zeros bring nothing."""
