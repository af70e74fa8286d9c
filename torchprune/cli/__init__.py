"""The commands, read and spoken; nothing imports them, and they may import everything."""
