"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.training.objectives import KL, OwnLoss, SquareHead

__all__ = ["KL", "OwnLoss", "SquareHead"]
