"""Figures with their thresholds, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One figure.

    Attributes:
        name: What was measured.
        value: The figure.
        unit: Of the figure and its bounds; "" for a ratio.
        at_most: Upper bound, or None.
        at_least: Lower bound, or None. Without either bound the figure is for information.
        note: What it was compared with, its spread.
    """

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the figure is within its bounds; None when it has none."""
        if self.at_most is None and self.at_least is None:
            return None
        return not (
            (self.at_most is not None and self.value > self.at_most)
            or (self.at_least is not None and self.value < self.at_least)
        )

    def as_dict(self) -> dict[str, object]:
        """Return the check as JSON would hold it."""
        return {
            "name": self.name,
            "value": float(f"{self.value:.5g}"),
            "unit": self.unit,
            "at_most": self.at_most,
            "at_least": self.at_least,
            "passed": self.passed,
            "note": self.note,
        }

    @property
    def bound(self) -> str:
        """The threshold for people; empty when there is none."""
        if self.at_least is not None:
            return f">= {self.at_least:.4g}"
        return "" if self.at_most is None else f"<= {self.at_most:.4g}"

    @property
    def verdict(self) -> str:
        """Whether the threshold is met, for people; empty when there is none."""
        return {True: "ok", False: "MISSED", None: ""}[self.passed]

    def line(self) -> str:
        """Return the check as one line of a table."""
        value = f"{self.value:.4g} {self.unit}".rstrip()
        return f"{self.name:<66}{value:>14}  {self.bound:<10}{self.verdict:<7}{self.note}".rstrip()


def print_table(checks: Iterable[Check]) -> None:
    """Print the checks, one a line."""
    for check in checks:
        print(check.line(), flush=True)


def markdown(checks: Iterable[Check]) -> str:
    """Return the checks as a Markdown table."""
    lines = ["| figure | value | threshold | | measured with |", "|---|---|---|---|---|"]
    for check in checks:
        value = f"{check.value:.4g} {check.unit}".rstrip()
        lines.append(f"| {check.name} | {value} | {check.bound} | {check.verdict} | {check.note} |")
    return "\n".join(lines) + "\n"
