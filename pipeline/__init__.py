"""Temper: a compiler for small vision models that stay right under attack, gated by measurement after every stage."""

__version__ = "0.1.0"
