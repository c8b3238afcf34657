"""Detectors: frozen values that tell inputs whose answers are not to be trusted."""
