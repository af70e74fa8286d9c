"""Products with weights that are a bitmask and their nonzeros, in C++ and in torch; imports
`masking`'s packing alone."""
