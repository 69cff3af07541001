"""Other weights with the same function: rescaling and permutations."""
