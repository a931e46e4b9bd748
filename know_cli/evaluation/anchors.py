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
#: A network trained like Θ0, but on 1/r times the data.
MORE_DATA = "more-data"
#: Θ0 trained on with 1/r times the data.
ORACLE = "oracle"
#: All, in the order of tables.
ANCHORS = (SCRATCH, NAIVE, LAST, LONGER, MORE_DATA, ORACLE)
