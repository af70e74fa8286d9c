"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""
