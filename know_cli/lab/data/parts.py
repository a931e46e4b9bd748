"""Which half of a data set meta-training may see, the other is for evaluation."""

from __future__ import annotations

from know_cli.lab.data import DataSet, Samples


def meta_part(data: DataSet) -> Samples:
    """The training samples of a data set that trajectories may be recorded on.

    Of data sets read from files that is the first half; the second is for evaluation, so that
    KNOWN is never judged by networks of samples that it has seen the like of. Glyphs can be
    rendered anew, texts be of another corpus, and of the digits only a half is here at all.
    """
    if data.name in ("digits", "text") or is_glyphs(data.name):
        return data.train
    half = len(data.train) // 2
    return Samples(data.train.inputs[:half], data.train.labels[:half])


def is_glyphs(name: str) -> bool:
    """Whether a data set's samples are rendered glyphs."""
    return name.startswith("glyphs-")
