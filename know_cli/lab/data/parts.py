"""The half of a data set that meta-training may use; the other half is for evaluation."""

from __future__ import annotations

from know_cli.lab.data import DataSet, Samples


def meta_part(data: DataSet) -> Samples:
    """The training samples of a data set that trajectories may be recorded on.

    Of data sets read from files this is the first half. The second is for evaluation, so that
    KNOWN is never evaluated on networks trained on samples that its own training used. Glyphs
    can be rendered anew, texts come from another corpus, and only half of the digits is used
    here anyway.
    """
    if data.name in ("digits", "text") or is_glyphs(data.name):
        return data.train
    half = len(data.train) // 2
    return Samples(data.train.inputs[:half], data.train.labels[:half])


def is_glyphs(name: str) -> bool:
    """Whether a data set's samples are rendered glyphs."""
    return name.startswith("glyphs-")
