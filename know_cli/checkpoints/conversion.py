"""What came of a conversion, and the lines that tell the user of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from know_cli.errors import counted, quoted, quoted_first

_MAX_NAMED = 3


@dataclass
class Conversion:
    """A checkpoint that is to be converted or was, and what the user should know of it.

    Attributes:
        output: the file or folder.
        tensors: number of tensors.
        nbytes: size of their data.
        nested: key under which the state dict was found; empty if it was at the top.
        shared: groups of names that share memory in the input; each is written in full.
        left_out: names in the state dict that are no tensors.
        strays: names of tensors around the state dict.
        averages: keys of moving averages of the weights that are in the file as well.
        averaged: names of converted tensors that are moving averages, by key or name.
        files_left_out: files beside a folder's weights that are not part of the output.
        remaining: files with other weights that were in the output's place and stay.
    """

    output: Path
    tensors: int = 0
    nbytes: int = 0
    nested: str = ""
    shared: list[list[str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    averages: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)
    files_left_out: list[Path] = field(default_factory=list)
    remaining: list[Path] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """Lines for the user."""
        lines = []
        if self.nested:
            lines.append(f"taking the state dict under {quoted(self.nested)}")
        if self.averaged and len(self.averaged) == self.tensors:
            lines.append("what is converted is a moving average of weights, by its name")
        elif self.averaged:
            one = len(self.averaged) == 1
            lines.append(
                f"{len(self.averaged)} of the {self.tensors} tensors {'is' if one else 'are'} a "
                f"moving average of weights, by {'its name' if one else 'their names'}: "
                f"{quoted_first(self.averaged, 1)}"
            )
        if self.averages:
            lines.append(
                "a moving average of the weights is there as well, under "
                f"{quoted_first(self.averages)}: --key {self.averages[0]} converts it"
            )
        for names in self.shared[:_MAX_NAMED]:
            lines.append(
                f"{', '.join(map(quoted, names))} share memory; each is written in full, so that "
                "every name is found"
            )
        if more := self.shared[_MAX_NAMED:]:
            shares = "shares" if len(more) == 1 else "share"
            lines.append(f"and {counted(len(more), 'more group')} that {shares} memory")
        if self.left_out:
            lines.append(f"left out, since they are no tensors: {quoted_first(self.left_out)}")
        if self.strays:
            lines.append(
                f"left out, since they are not in the state dict: {quoted_first(self.strays)}"
            )
        lines += [f"{path}: left out, it is not of the model" for path in self.files_left_out]
        lines += [
            f"{path}: was there before and stays, beside the converted weights"
            for path in self.remaining
        ]
        return lines
