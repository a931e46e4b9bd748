"""The paper's tables: what each figure is of, and which task and start measure it here.

The figures are as a public summary of the paper quotes them (:data:`QUOTED`), since the paper's own
tables could not be read here; what the summary leaves out is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from know_cli.evaluation.anchors import LAST, LONGER, NAIVE, SCRATCH
from know_cli.evaluation.release.task import DECAYED, RETRODICTION, SESSIONS

QUOTED = (
    "as a public summary of the paper quotes them (papernotes.org, CVPR 2026); they were not "
    "compared with the paper itself"
)
#: What the paper lacks, and what its gains have to be compared with: Θ0 trained for as long as the
#: forgetting takes, the most forgotten checkpoint, the mean of all, Θ0's weights halved.
CONTROLS = (LONGER, DECAYED, LAST, "average", "shrink-0.5", SCRATCH)


@dataclass(frozen=True)
class Figure:
    """One figure of a table.

    Attributes:
        text: as it is quoted; empty where it is not.
        task: of the release regime that measures it here; empty where none does.
        share: of the downstream examples, in per cent.
        start: of the fine-tuning.
    """

    text: str
    task: str = ""
    share: int = 100
    start: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        title: what is transferred to what.
        measure: what the figures are.
        columns: their names.
        rows: by name, a figure for each column.
        note: what is to be known of it.
        has_controls: whether they are told here; else another table has them.
    """

    title: str
    measure: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Figure]]]
    note: str = ""
    has_controls: bool = True

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that measure it, each once."""
        figures = (figure for _, of in self.rows for figure in of)
        return list(dict.fromkeys(figure.task for figure in figures if figure.task))


_RESNET18 = "release-cifar100-cifar10-resnet18"
_SHARES = (100, 50, 25)


def _row(
    name: str, start: str, texts: str, tasks: Sequence[tuple[str, int]]
) -> tuple[str, Sequence[Figure]]:
    pairs = zip(texts.split("|"), tasks, strict=True)
    return name, [Figure(text.strip(), task, share, start) for text, (task, share) in pairs]


def _known(
    factor: str, texts: str, tasks: Sequence[tuple[str, int]]
) -> tuple[str, Sequence[Figure]]:
    return _row(f"KNOWN {factor}", f"retrodiction-{factor.replace('×', 'x')}", texts, tasks)


def _of_sessions(sessions: int, texts: str) -> tuple[str, Sequence[Figure]]:
    """The first S checkpoints predict from Θ0 on, each S with its own KNOWN."""
    stem = RETRODICTION if sessions == SESSIONS else f"{RETRODICTION}-s{sessions}"
    figures = zip((2, 4, 8), texts.split("|"), strict=True)
    return f"S = {sessions}", [
        Figure(text.strip(), _RESNET18, 100, f"{stem}-x{factor}") for factor, text in figures
    ]


def _shares_of(task: str) -> list[tuple[str, int]]:
    return [(task, share) for share in _SHARES]


def _pvt(*names: str) -> list[tuple[str, int]]:
    return [(f"release-imagenet100-{name}-pvt" if name else "", 100) for name in names]


_RESNET = _shares_of(_RESNET18)
_FIVE = _pvt("cifar100", "tiny", "cars", "cub", "flowers")
_DOMAINS = _pvt("pacs-art", "pacs-sketch", "pacs-cartoon", "pacs-photo", "")
_STREETS = [("release-voc-cityscapes-deeplab", 100)]
_WORDS = _pvt("flickr8k")

#: In the paper's order.
PAPER_TABLES = (
    PaperTable(
        "ResNet18, CIFAR-100 to CIFAR-10",
        "accuracy in per cent",
        ("100 % of the data", "50 %", "25 %"),
        (
            _row("naive", NAIVE, "92.40 | 92.08 | ", _RESNET),
            _known("×2", "93.00 ± 0.11 | 92.58 ± 0.14 | 92.29 ± 0.04", _RESNET),
            _known("×4", "93.27 ± 0.09 | 92.62 ± 0.25 | 92.88 ± 0.11", _RESNET),
            _known("×8", "93.55 ± 0.05 | 93.11 ± 0.19 | 92.92 ± 0.15", _RESNET),
        ),
    ),
    PaperTable(
        "ResNet18, CIFAR-100 to CIFAR-10, by the number S of checkpoints",
        "accuracy in per cent",
        ("×2", "×4", "×8"),
        (
            _of_sessions(2, "92.69 | 92.70 | 92.65"),
            _of_sessions(3, "93.01 | 93.04 | 92.72"),
            _of_sessions(4, "92.97 | 93.10 | 92.89"),
            _of_sessions(5, "93.00 | 93.27 | 93.55"),
        ),
        "Each S has a KNOWN of its own.",
        has_controls=False,
    ),
    PaperTable(
        "PVTv2 trained on ImageNet, to five data sets",
        "accuracy in per cent",
        ("CIFAR-100", "TinyImageNet", "Stanford Cars", "CUB", "Oxford Flowers"),
        (
            _row("naive", NAIVE, " |  |  |  | ", _FIVE),
            _known("×3", "82.46 | 77.53 |  | 71.18 | ", _FIVE),
            _known("×9", " |  |  |  | ", _FIVE),
        ),
        "Here ImageNet-100 stands for ImageNet; the paper's sizes of pictures are not known.",
    ),
    PaperTable(
        "PACS, one domain left out",
        "accuracy in per cent",
        ("art", "sketch", "cartoon", "photo", "mean"),
        (
            _row("naive", NAIVE, " |  |  |  | 63.48", _DOMAINS),
            _known("×3", "72.12 | 44.11 | 62.73 | 93.87 | 68.21", _DOMAINS),
            _known("×9", "72.07 | 44.02 | 64.28 | 92.98 | 68.33", _DOMAINS),
        ),
        "Here PVTv2-B1 on ImageNet-100; which network the paper has is not known.",
    ),
    PaperTable(
        "DeepLabV3+, Pascal VOC to Cityscapes",
        "mean intersection over union in per cent",
        ("Cityscapes",),
        (
            _row("naive", NAIVE, "", _STREETS),
            _known("×3", "69.00 ± 1.04", _STREETS),
            _known("×9", "71.22 ± 0.82", _STREETS),
        ),
        "Here at 256 by 512 pixels on a ResNet50; the paper's sizes are not known.",
    ),
    PaperTable(
        "PVTv2 and a transformer's decoder, captions of Flickr8k",
        "masked accuracy in per cent",
        ("Flickr8k",),
        (
            _row("naive", NAIVE, "about 37.2", _WORDS),
            _row("KNOWN (step not quoted)", "retrodiction-x3", "39.38", _WORDS),
        ),
    ),
)  # fmt: skip
