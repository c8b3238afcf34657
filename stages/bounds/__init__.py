"""Certifiers: sound lower bounds on a network's outputs over a box of inputs."""
