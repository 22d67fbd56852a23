"""Tools that know nothing of memories or models: durable files, JSON, progress bars, fingerprints."""
