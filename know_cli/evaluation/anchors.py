"""Names of the starts that need no prediction, against which predictions are measured."""

from __future__ import annotations

#: Fresh weights.
SCRATCH = "scratch"
#: Θ0 itself.
NAIVE = "naive"
#: The most-forgotten checkpoint.
LAST = "last"
#: Θ0 trained on with D0 for what the forgetting costs.
LONGER = "longer"
#: The combination of the checkpoints that fits the additional data best.
HINDSIGHT = "hindsight"
#: A network trained like Θ0, but on 1/r times the data.
MORE_DATA = "more-data"
#: Θ0 trained on with 1/r times the data.
ORACLE = "oracle"
#: All, in the order of tables.
ANCHORS = (SCRATCH, NAIVE, LAST, LONGER, HINDSIGHT, MORE_DATA, ORACLE)
