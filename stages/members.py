"""Ensembles taken apart: every attack with a name of its own."""

from collections.abc import Iterator, Sequence

from stages.attacks.apgd import APGD
from stages.attacks.auto import Auto
from stages.attacks.base import Attack
from stages.attacks.fab import FAB
from stages.attacks.worst_of import WorstOf
from stages.threat import Threat


def named(attacks: Sequence[Attack], threat: Threat) -> dict[str, Attack]:
    """Every attack by its kind, the loss and "targeted" where that tells members apart; ensembles as their members.

    The second of one name ends in `_2`. Raises `InputError` for an attack without a version for the threat's norm.
    """
    found: dict[str, Attack] = {}
    for attack in members(attacks, threat):
        attack.accept(threat)
        name, number = _name(attack), 1
        while name in found:
            number += 1
            name = f"{_name(attack)}_{number}"
        found[name] = attack
    return found


def members(attacks: Sequence[Attack], threat: Threat) -> Iterator[Attack]:
    """In the order in which they strike."""
    for attack in attacks:
        if isinstance(attack, Auto):
            yield from attack.members(threat).attacks
        elif isinstance(attack, WorstOf):
            yield from members(attack.attacks, threat)
        else:
            yield attack


def _name(attack: Attack) -> str:
    if isinstance(attack, APGD):
        return f"apgd_{attack.loss}" + ("_targeted" if attack.targets else "")
    return attack.kind + ("_targeted" if isinstance(attack, FAB) and attack.targets else "")
