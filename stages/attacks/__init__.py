"""Attacks: frozen values whose one verb looks for adversarial examples within a threat."""
