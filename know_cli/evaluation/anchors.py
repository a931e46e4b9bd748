"""Names of the starts that need no prediction, which predictions are compared with."""

from __future__ import annotations

#: Fresh weights.
SCRATCH = "scratch"
#: Θ0 itself.
NAIVE = "naive"
#: The most-forgotten checkpoint.
LAST = "last"
#: Θ0 trained further on D0, for as many steps as the forgetting takes.
LONGER = "longer"
#: The combination of the checkpoints that fits the additional data best.
HINDSIGHT = "hindsight"
#: A network trained like Θ0, but on 1/r times the data.
MORE_DATA = "more-data"
#: Θ0 trained further on 1/r times the data.
ORACLE = "oracle"
#: All of them, in the order of the tables.
ANCHORS = (SCRATCH, NAIVE, LAST, LONGER, HINDSIGHT, MORE_DATA, ORACLE)

#: The start that ``know choose`` chooses.
CHOSEN = "chosen"
#: All starts that are no method's prediction.
UNPREDICTED = (*ANCHORS, CHOSEN)
