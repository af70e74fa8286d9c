"""Structures that can be removed whole: found in the graph, masked, and physically taken out."""
