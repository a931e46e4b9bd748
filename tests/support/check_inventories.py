"""How often tensors are classified wrongly, on inventories of real architectures.

``python -m tests.support.check_inventories inventories.zip`` prints the error rates over a zip
of JSON files, each ``{"arch", "library", "bn", "tensors"}``: ``tensors`` holds [name, shape,
dtype, right kind or kinds with |, type of the module], where the kind ``norm`` is that of a
normalisation layer's parameters, and ``bn`` holds, by the prefix of each BatchNorm, the weights
that feed it ([null] where an activation, a sum or nothing that has weights does).
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from know_cli.kinds import Kind, classify_all
from know_cli.normalisation import NormLayer, find_norm_layers

Inventory = Mapping[str, Any]


@dataclass
class Score:
    """What was right and wrong in some inventories.

    Attributes:
        tensors: how many there are.
        wrong: (name, shape, right kinds, found) of those of another kind.
        norms_missed: (name, shape, right, found) of the right kind, but not found to be a norm's.
        norms_invented: the same of those that are no norm's.
        fed: BatchNorms that one layer feeds.
        wrong_sources: (prefix, right, found).
        missed_sources: prefixes of those of ``fed`` whose source was not found.
    """

    tensors: int = 0
    wrong: list[tuple[str, list[int], str, str]] = field(default_factory=list)
    norms_missed: list[tuple[str, list[int], str, str]] = field(default_factory=list)
    norms_invented: list[tuple[str, list[int], str, str]] = field(default_factory=list)
    fed: int = 0
    wrong_sources: list[tuple[str, list[str | None], str]] = field(default_factory=list)
    missed_sources: list[str] = field(default_factory=list)

    def add(self, other: Score) -> None:
        """Take in another's."""
        self.tensors += other.tensors
        self.fed += other.fed
        self.wrong += other.wrong
        self.norms_missed += other.norms_missed
        self.norms_invented += other.norms_invented
        self.wrong_sources += other.wrong_sources
        self.missed_sources += other.missed_sources

    @property
    def share_wrong(self) -> float:
        """Tensors of a wrong kind, of all."""
        return len(self.wrong) / max(self.tensors, 1)

    @property
    def share_wrong_strictly(self) -> float:
        """Tensors of a wrong kind, or wrongly found to be a norm's or not, of all."""
        wrong = len(self.wrong) + len(self.norms_missed) + len(self.norms_invented)
        return wrong / max(self.tensors, 1)

    @property
    def share_missed(self) -> float:
        """BatchNorms with a source that was not found, of those that have one."""
        return len(self.missed_sources) / max(self.fed, 1)


def read_inventories(path: Path) -> Iterator[tuple[str, Inventory]]:
    """The inventories of a zip, by name."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".json"):
                yield Path(name).stem, json.loads(archive.read(name))


def check(inventory: Inventory) -> Score:
    """Classify one inventory and compare."""
    tensors = {name: (tuple(shape), dtype) for name, shape, dtype, *_ in inventory["tensors"]}
    classes = classify_all(tensors)
    layers = find_norm_layers({name: shape for name, (shape, _) in tensors.items()})
    affine = {name for layer in layers for name in layer.affine}
    score = Score(tensors=len(tensors))
    for name, shape, _, right, _ in inventory["tensors"]:
        kinds = right.split("|")
        found = classes[name].kind.value
        is_norm = name in affine and found == Kind.BIAS.value
        entry = name, shape, right, "norm" if is_norm else found
        if found not in ["bias" if kind == "norm" else kind for kind in kinds]:
            score.wrong.append(entry)
        elif is_norm and "norm" not in kinds:
            score.norms_invented.append(entry)
        elif kinds == ["norm"] and not is_norm:
            score.norms_missed.append(entry)
    _check_sources(score, inventory["bn"] or {}, {layer.prefix: layer for layer in layers})
    return score


def _check_sources(
    score: Score, right: Mapping[str, list[str | None]], layers: Mapping[str, NormLayer]
) -> None:
    for prefix, sources in right.items():
        if sources == ["unused"]:
            continue
        layer = layers.get(prefix)
        found = layer.source_weight if layer else None
        has_one = len(sources) == 1 and sources[0] is not None
        score.fed += has_one
        if found is not None and sources != [found]:
            score.wrong_sources.append((prefix, sources, found))
        elif found is None and has_one:
            score.missed_sources.append(prefix)


def main() -> None:
    """Print the error rates of all inventories together, and of the worst."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--all] ZIP")
    parser.add_argument("zip", type=Path)
    parser.add_argument("--all", action="store_true", help="list every fault")
    arguments = parser.parse_args()
    total, scores = Score(), {}
    for name, inventory in read_inventories(arguments.zip):
        scores[name] = check(inventory)
        total.add(scores[name])
    worst = sorted(scores.items(), key=lambda item: -item[1].share_wrong_strictly)
    for name, score in worst if arguments.all else worst[:20]:
        faults = [*score.wrong, *score.norms_missed, *score.norms_invented]
        if faults or (arguments.all and (score.wrong_sources or score.missed_sources)):
            print(f"{name}: {len(faults)} of {score.tensors} tensors, such as {faults[:1]}")
        if arguments.all:
            print(*(f"    {fault}" for fault in faults), sep="\n")
            print(*(f"    source missed: {prefix}" for prefix in score.missed_sources), sep="\n")
    for name, score in scores.items():
        for prefix, right, found in score.wrong_sources:
            print(f"{name}: {prefix} is fed by {right}, not by {found}")
    print(
        f"{len(scores)} inventories, {total.tensors} tensors: "
        f"{total.share_wrong:.3%} of a wrong kind, {len(total.norms_missed)} norm parameters "
        f"missed, {len(total.norms_invented)} invented ({total.share_wrong_strictly:.3%} in all)\n"
        f"{total.fed} BatchNorms with a source: {len(total.wrong_sources)} wrong, "
        f"{total.share_missed:.1%} missed"
    )


if __name__ == "__main__":
    main()
