"""Applies a target's passes in order, and compares the graph before and after."""
