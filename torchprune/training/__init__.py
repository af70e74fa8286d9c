"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.specs.quantize import Int4, Int8

__all__ = ["Int4", "Int8"]
