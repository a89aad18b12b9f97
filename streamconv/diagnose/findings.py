"""What the doctor tells: findings, one line each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, why it matters, and what to do. ``problem`` is false for what is only worth knowing."""

    what: str
    where: str
    why: str
    do: str
    problem: bool = True

    def __str__(self) -> str:
        return f"{'problem' if self.problem else 'note'}: {self.where}: {self.what}. {self.why}; {self.do}."
