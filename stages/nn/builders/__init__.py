"""Network builders: one file per family, normalisation inside."""
