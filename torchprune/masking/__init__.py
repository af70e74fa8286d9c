"""Masks as parametrizations, their exact counts, and which layers get them; imports `specs` and
what stands below it."""
