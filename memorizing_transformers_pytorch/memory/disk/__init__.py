"""A memory as a folder: written atomically, extended by journals, checked before it is used (docs/format.md)."""
