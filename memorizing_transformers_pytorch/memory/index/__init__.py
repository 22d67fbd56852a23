"""Finding the stored keys with the largest inner product: exactly (`exact`), or in inverted lists (`approximate`)."""
