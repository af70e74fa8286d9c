"""One budget of zeros shared unevenly among layers, by rules and by search; imports `methods` and
what stands below it, and `checkpoint` for its own files."""
