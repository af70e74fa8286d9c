"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.training.mask_lora import (
    MaskLoRA,
    add_mask_lora,
    merge_mask_lora,
    remove_mask_lora,
)

__all__ = ["MaskLoRA", "add_mask_lora", "merge_mask_lora", "remove_mask_lora"]
