"""The one exception that a user's mistake raises."""

from __future__ import annotations


class InputError(Exception):
    """Wrong input from the user: a file, a flag, a configuration field, a checkpoint.

    The command line prints it without a traceback and exits with status 2.

    Args:
        what: what is wrong, as a sentence without a full stop.
        where: the file, line, field or tensor that is wrong.
        expected: what would be right.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "") -> None:
        self.what, self.where, self.expected = what, where, expected
        super().__init__(what, where, expected)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        return "\n".join(lines)
