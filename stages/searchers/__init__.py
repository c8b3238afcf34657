"""Searchers: choose an architecture under a cost."""
