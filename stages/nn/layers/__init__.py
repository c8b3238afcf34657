"""Layers that compression puts in the place of dense ones, and parts shared by builders."""
