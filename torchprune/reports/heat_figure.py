"""A heat map by matplotlib."""
