"""Importing this keeps lines of other libraries quiet that tell nothing, so it comes first."""

from torchprune.cli.noise import hush

hush()
