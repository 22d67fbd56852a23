"""What the package reads from disk, mutated: only the documented errors may come of it."""
