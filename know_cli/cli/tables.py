"""Plans and reports as text for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from know_cli.errors import counted, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.checkpoints import Trajectory
    from know_cli.engine.report import Report
    from know_cli.prediction.predict import Prediction


def count_text(count: float) -> str:
    """A number of parameters: ``950``, ``12.3 k``, ``4.56 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def bytes_text(count: float) -> str:
    """A number of bytes in powers of 1024: ``950 B``, ``12.3 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"


class PrintableTable(Table):
    """A table whose cells show what they hold, whatever characters a stranger chose."""

    def add_row(self, *cells: Any, **named: Any) -> None:
        """Add a row; cells that are no texts are printed as they are."""
        super().add_row(
            *(printable(cell) if isinstance(cell, str) else cell for cell in cells), **named
        )


def new_table(*columns: str) -> Table:
    """A table whose first column is words and the others numbers."""
    table = PrintableTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for position, column in enumerate(columns):
        # Where the terminal is too narrow, words are folded and no digit is lost.
        table.add_column(
            printable(column),
            justify="left" if position == 0 else "right",
            no_wrap=position > 0,
            overflow="fold",
        )
    return table


def heading(prediction: Prediction) -> str:
    """One line on what is predicted from what."""
    steps, rate = prediction.request.settings.steps, prediction.recipe.known_rate
    count, trajectory = counted(steps, "step"), prediction.trajectory
    if len(trajectory) == 1:
        what = f"{count} from {trajectory.first.path} alone"
    elif rate is None:
        what = f"{count} from {trajectory_text(trajectory)}"
    else:
        what = (
            f"{prediction.recipe.factor} the data: {count} from {len(trajectory)} checkpoints at "
            f"rate {rate:.3g}"
        )
    return f"{what}, {_method_text(prediction)}"


def trajectory_text(trajectory: Trajectory) -> str:
    """What a run or branches are: ``5 checkpoints of a run, steps 500 to 100``."""
    from know_cli.checkpoints.metadata import TrajectoryKind

    if trajectory.kind is TrajectoryKind.BRANCHES:
        count = counted(len(trajectory) - 1, "branch", "branches")
        return f"{count} of {trajectory.first.path}"
    text, steps = f"{len(trajectory)} checkpoints of {trajectory.kind.text}", None
    if trajectory.kind is TrajectoryKind.RUN:
        steps = trajectory.training_steps
    return text if steps is None else f"{text}, training steps {steps[0]} to {steps[-1]}"


def _method_text(prediction: Prediction) -> str:
    from know_cli.methods.registry import find_method

    words = [prediction.recipe.method, *(f"{k}={v}" for k, v in prediction.recipe.options.items())]
    bundle = prediction.bundle
    if bundle is None:
        return " ".join(words)
    if find_method(prediction.recipe.method).hyper_model != "known":
        return " ".join([*words, bundle.digest[:8]])
    known = f"KNOWN {bundle.target} {bundle.digest[:8]}"
    return known if prediction.recipe.method == "known" else f"{' '.join(words)} of {known}"


def plan_tables(prediction: Prediction) -> list[RenderableType]:
    """What a run would do."""
    from know_cli.engine.plan import Action
    from know_cli.kinds import Kind

    plan = prediction.plan
    table = new_table("kind", "tensors", "parameters", "predicted")
    for kind in Kind:
        of_kind = [tensor for tensor in plan.tensors if tensor.kind is kind]
        predicted = [tensor for tensor in of_kind if tensor.action is Action.PREDICT]
        if of_kind:
            table.add_row(
                kind.value,
                str(len(of_kind)),
                count_text(sum(tensor.elements for tensor in of_kind)),
                count_text(sum(tensor.elements for tensor in predicted)),
            )
    reasons = Counter(
        f"{tensor.action.value}: {tensor.reason}"
        for tensor in plan.tensors
        if tensor.action is not Action.PREDICT
    )
    lines: list[RenderableType] = [
        f"plan, nothing is written · {heading(prediction)}",
        *_coefficients(prediction),
        "",
        table,
        "",
    ]
    lines += [_not_predicted(reason, count) for reason, count in sorted(reasons.items())]
    lines.append(
        f"reads {bytes_text(plan.bytes_to_read)}, writes {bytes_text(plan.bytes_to_write)}, "
        f"works in {bytes_text(plan.memory)} of memory"
    )
    lines += [f"would write {output.path}" for output in prediction.outputs]
    return lines


def report_tables(prediction: Prediction, report: Report) -> list[RenderableType]:
    """What a run did."""
    table = new_table("kind", "tensors", "parameters", "mean |change|", "relative change", "copied")
    for kind, numbers in report.kinds.items():
        if numbers.tensors:
            mean, relative = numbers.mean_change, numbers.relative_change
            table.add_row(
                kind.value,
                str(numbers.tensors),
                count_text(numbers.parameters),
                "-" if mean is None else f"{mean:.3g}",
                "-" if relative is None else f"{relative:.2%}",
                f"{numbers.share_copied:.0%}",
            )
    lines: list[RenderableType] = [heading(prediction), *_coefficients(prediction), "", table, ""]
    lines += [_not_predicted(reason, count) for reason, count in sorted(report.reasons.items())]
    if report.frozen:
        lines.append(
            f"copy: frozen: the same in all checkpoints ({count_text(report.frozen)} element"
            f"{'s' * (report.frozen != 1)} of predicted tensors)"
        )
    if report.truncations:
        errors = report.truncations
        worst = max(errors, key=lambda name: errors[name])
        lines.append(
            f"products of {counted(len(errors), 'LoRA pair')} averaged: what their rank does not "
            "hold is "
            f"{sum(errors.values()) / len(errors):.2%} of them on average, {errors[worst]:.2%} at "
            f"most ({worst})"
        )
    if report.replaced:
        lines.append(_not_finite(report.replaced, "prediction"))
    if report.nonfinite:
        lines.append(_not_finite(report.nonfinite, "input"))
    seconds = report.seconds
    speed = report.predicted * prediction.request.settings.steps / max(seconds["total"], 1e-9)
    lines.append(
        f"read {seconds['reading']:.2f} s, computed {seconds['computing']:.2f} s, wrote "
        f"{seconds['writing']:.2f} s (threads added up), in all {seconds['total']:.2f} s: "
        f"{count_text(speed)} parameters per second per step"
    )
    if report.peak_memory is not None:
        lines.append(
            f"{bytes_text(prediction.plan.memory)} of working memory, and with Python and torch "
            f"{bytes_text(report.peak_memory)} at most"
        )
    sizes = report.bytes_written // max(len(report.outputs), 1)
    lines += [f"wrote {path} ({bytes_text(sizes)})" for path, _ in report.outputs]
    lines += [f"wrote {path}" for path in report.digests]
    return lines


def _coefficients(prediction: Prediction) -> list[str]:
    """One line on what is averaged with which coefficients, where something is."""
    coefficients = prediction.recipe.coefficients
    if coefficients is None:
        return []
    paths = [checkpoint.path for checkpoint in prediction.trajectory.checkpoints]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    parts = (f"{c:.4g} · {name}" for c, name in zip(coefficients, names, strict=True) if c)
    return [f"average: {' + '.join(parts)}"]


def _not_finite(count: int, what: str) -> str:
    were = "was" if count == 1 else "were"
    return f"{counted(count, what)} {were} not finite: the first checkpoint's value"


def _not_predicted(reason: str, count: int) -> str:
    return f"{reason} ({counted(count, 'tensor')})"
