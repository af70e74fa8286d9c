"""Whole units scored, masked and physically removed; imports `passes`, `graph`, `methods` and what
stands below them."""
