"""The laws of a saved artifact, each checked again from its files and by running it."""
