"""Our own files, written whole and read with distrust; imports `structure` and what stands below
it."""
