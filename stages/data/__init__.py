"""Data sets: real images from local files, checked before use."""
