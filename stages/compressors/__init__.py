"""Compressors: a model in, a smaller model with more rewrites out."""
