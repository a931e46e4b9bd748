"""Which branches are grown from which run, for how long, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from know_cli.errors import UsageError
from know_cli.evaluation.tasks import TASKS, Task

#: Branches of each Θ0.
BRANCHES = 5
#: The steps of a branch as a share of those of the run that it goes on from.
SHARE = 0.2
#: Share of the run's data in each subset.
RATE = 0.5
#: Classes of each fine-tuning of other tasks.
CLASSES = 4

#: Names of the arms: Θ0; the mean of the single branches' values; the value of the best of them,
#: known in hindsight; the mean of their weights; one continuation of as many steps as all
#: branches together, at the same rate or, for other tasks, on all of them at once; the same with
#: the rate falling to 0.
NAIVE, BRANCH, BEST, FUSED = "naive", "branch", "best branch", "average"
LONGER, ANNEALED, MULTI_TASK = "longer", "annealed", "multi-task"


class Sort(str, Enum):
    """What branches differ in: the order of the same data, their subset of it, or their task."""

    ORDERS = "orders"
    SUBSETS = "subsets"
    TASKS = "tasks"


@dataclass(frozen=True)
class BranchTask:
    """A run and the branches that go on from its end.

    Attributes:
        sort: of the branches.
        base: the task whose run it is.
    """

    sort: Sort
    base: Task

    @property
    def name(self) -> str:
        """For the command line, such as ``orders-fashion-classes-cnn``."""
        return f"{self.sort.value}-{self.base.name}"

    @property
    def title(self) -> str:
        """What is branched, in words."""
        words = {
            Sort.ORDERS: "the same data in other orders",
            Sort.SUBSETS: f"independent subsets of {RATE:g} of the data",
            Sort.TASKS: f"other tasks, {CLASSES} classes each",
        }[self.sort]
        return f"{self.base.title}; {BRANCHES} branches on {words}"


TASK_NAMES = ("fashion-classes-cnn", "cifar10-classes-resnet", "text-language-model")
#: Branch tasks by name.
BRANCH_TASKS = {
    task.name: task
    for task in (
        *(BranchTask(sort, TASKS[n]) for sort in (Sort.ORDERS, Sort.SUBSETS) for n in TASK_NAMES),
        BranchTask(Sort.TASKS, TASKS["glyphs-alphabets-resnet"]),
    )
}


def find_branch_tasks(patterns: list[str]) -> list[BranchTask]:
    """The branch tasks that match names or glob patterns, in the registry's order.

    Args:
        patterns: none stands for all.

    Raises:
        UsageError: a pattern matches no task.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in BRANCH_TASKS):
            raise UsageError(
                f"no task of branches is named {pattern!r}; choose from {', '.join(BRANCH_TASKS)}"
            )
    return [
        task
        for name, task in BRANCH_TASKS.items()
        if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
