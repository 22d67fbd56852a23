"""Libraries: memories on disk that are built from files, by a model of a run or of transformers."""
