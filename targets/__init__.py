"""Devices as pages of data, the passes that lower a graph for them, and the runtime that ships."""
