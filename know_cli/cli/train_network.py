"""``know train --objective network``: teach a hyper-model through the networks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.output import Output
from know_cli.errors import UsageError, counted
from know_cli.meta.network_settings import HyperModel, NetworkSettings
from know_cli.settle.shipped import FEWEST

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.meta.network_bundle import Progress
    from know_cli.meta.network_data import NetworkRun


#: By kind of trajectory, what gains are counted from.
_BASES = {"run": "the last checkpoint", "forgetting": "Θ0", "branches": "Θ0"}
_COLUMNS = ("start", "points", "nats", "{} ahead by points", "by nats")
_GROUPS = {
    "runs": "{} held out",
    "architectures": "{} of architectures that were never taught on",
}


@dataclass(frozen=True)
class NetworkRequest:
    """What is asked for.

    Attributes:
        runs: folders of runs, of branches, or of collected forgettings.
        output: for the bundle; None where one is only measured.
        settings: how to teach.
        holdout: share of the runs that is held out.
        architectures: none of which is taught on.
        data_folder: where the data sets' files are.
        json, table: also get the gains and the curve, as JSON and Markdown; None for nowhere.
        every: steps between measurements.
        threads: of torch.
    """

    runs: Sequence[Path]
    output: Path | None
    settings: NetworkSettings
    holdout: float
    architectures: tuple[str, ...] = field(default=())
    data_folder: Path | None = None
    json: Path | None = None
    table: Path | None = None
    every: int = 50
    threads: int | None = None


def check_model(
    model: HyperModel | None,
    of_known: Mapping[str, object],
    of_settle: Mapping[str, object],
    *,
    measured: bool,
) -> None:
    """Refuse options of the other hyper-model, and all of both where a bundle is measured.

    Args:
        model: None is settle.
        of_known: by option of KNOWN, what is true where it was given.
        of_settle: likewise of settle.
        measured: whether a bundle is measured, which says its own.

    Raises:
        UsageError: the first of them.
    """
    if measured:
        own = next((name for name, value in {**of_known, **of_settle}.items() if value), None)
        if own is not None:
            raise UsageError(f"--{own}: a bundle says its own; leave it out with --evaluate")
        return
    is_known = model is HyperModel.KNOWN
    others = of_settle if is_known else of_known
    given = next((name for name, value in others.items() if value), None)
    if given is not None:
        hint = "leave it out" if is_known else f"give --model {HyperModel.KNOWN.value} as well"
        owner = HyperModel.SETTLE if is_known else HyperModel.KNOWN
        raise UsageError(f"--{given}: with --objective network is {owner.value}'s; {hint}")


def through_networks(
    talk: Output, request: NetworkRequest, evaluate: Sequence[Path], *, force: bool
) -> None:
    """Teach a bundle, or where there is no output for one, measure the first of those given.

    Raises:
        KnowError: an output exists already, or is an input, or there are too few checkpoints to
            read; and what :func:`train_network` and
            :func:`measure_networks` raise.
    """
    from know_cli.cli.report_file import check_reports
    from know_cli.known.shipped import check_bundle_output

    others, settings = list(request.runs), request.settings
    if request.output is not None:
        if settings.model is HyperModel.SETTLE and settings.checkpoints < FEWEST:
            raise UsageError(
                f"--checkpoints {settings.checkpoints}: settle reads at least {FEWEST}, of "
                "branches Θ0 and two of them; give more"
            )
        check_bundle_output(request.output, request.runs, force=force)
        others.append(request.output)
    check_reports(request.json, request.table, others, force=force)
    if request.output is None:
        measure_networks(talk, request, evaluate[0], force=force)
    else:
        train_network(talk, request, force=force)


def train_network(talk: Output, request: NetworkRequest, *, force: bool) -> None:
    """Teach a bundle, report as it goes, and show what it gains on runs held out.

    Raises:
        KnowError: there are too few runs, a file cannot be read or written, or the training
            diverges.
    """
    import torch

    from know_cli.cli.report_file import write_out, write_report
    from know_cli.files import remove_file
    from know_cli.meta.kept import kept_beside
    from know_cli.meta.network_bundle import split_runs, teach_bundle
    from know_cli.meta.network_downstream import check_examples, with_other_tasks
    from know_cli.meta.network_models import check_taught_on, save_bundle
    from know_cli.meta.network_training import check_partial

    torch.set_num_threads(request.threads or 1)
    settings, output = request.settings, request.output
    assert output is not None
    partial = kept_beside(output)
    check_partial(partial)
    runs = _load(talk, request, settings.checkpoints)
    check_taught_on(settings, runs[0].trajectory)
    split = split_runs(runs, request.holdout, settings.seed, request.architectures)
    if settings.distance:
        _tell_targets(talk, split.training, settings.checkpoints)
    if settings.downstream:
        taught_on = with_other_tasks(split.training, request.data_folder)
        check_examples(taught_on, settings)
        split = replace(split, training=taught_on)
    kind = split.training[0].trajectory
    counts = [
        _GROUPS[group].format(kind.counted(len(found))) for group, found in split.held_out.items()
    ]
    talk.notice(f"{kind.counted(len(split.training))} to learn from, and {', '.join(counts)}")
    extra: dict[str, Any] = {
        "holdout": request.holdout,
        "held_out_architectures": list(request.architectures),
    }
    began = time.process_time()
    bundle = teach_bundle(
        split,
        settings,
        extra,
        lambda progress: talk.notice(_line(progress, settings.steps, kind.units)),
        every=request.every,
        partial=partial,
    )
    save_bundle(bundle, output, replace=force)
    remove_file(partial)
    facts = {
        **bundle.to_json(),
        "processor_seconds": round(time.process_time() - began),
    }
    if request.json is not None:
        write_report(request.json, facts, force=force)
    if request.table is not None:
        write_out(request.table, network_markdown(facts), force=force)
    talk.show(*_tables(facts), f"wrote {output}: {bundle.digest}")


def measure_networks(talk: Output, request: NetworkRequest, bundle: Path, *, force: bool) -> None:
    """Show what a bundle gains on those of the runs that it was not taught on.

    Raises:
        KnowError: it was taught on all, or a file cannot be read or written.
    """
    import torch

    from know_cli.cli.report_file import write_out, write_report
    from know_cli.meta.network_bundle import measure_bundle
    from know_cli.meta.network_models import load_bundle, model_of

    torch.set_num_threads(request.threads or 1)
    loaded = load_bundle(bundle)
    model_of(loaded)  # what cannot be measured is refused before many networks are read
    runs = _load(talk, request, loaded.checkpoints)
    for run in runs:
        if run.trajectory is not loaded.trajectory:
            raise UsageError(
                f"{bundle}: was taught on {loaded.trajectory.plural}, and {run.name} is of "
                f"{run.trajectory.text}"
            )
    began = time.process_time()
    facts = measure_bundle(loaded, runs)
    facts["processor_seconds"] = round(time.process_time() - began)
    if request.json is not None:
        write_report(request.json, facts, force=force)
    if request.table is not None:
        write_out(request.table, network_markdown(facts), force=force)
    talk.show(*_tables(facts))


def _load(talk: Output, request: NetworkRequest, checkpoints: int) -> list[NetworkRun]:
    """What can be used of what was recorded; what is left out is told."""
    from know_cli.meta.network_loading import load_networks

    runs, left_out = load_networks(request.runs, checkpoints, request.data_folder)
    if not runs:
        path, reason = next(iter(left_out.items()))
        raise UsageError(f"none of {len(left_out)} can be taught with: {path}: {reason}")
    reasons: dict[str, list[Path]] = {}
    for path, reason in left_out.items():
        reasons.setdefault(reason, []).append(path)
    for reason, (first, *others) in reasons.items():
        also = f" and {len(others)} more" if others else ""
        talk.warning(f"left out {first}{also}: {reason}")
    return runs


def _tell_targets(talk: Output, runs: Sequence[NetworkRun], checkpoints: int) -> None:
    """Say of how many windows of forgettings ``--distance`` has a target; all others have one.

    Raises:
        UsageError: there is none.
    """
    if runs[0].trajectory is not TrajectoryKind.FORGETTING:
        return
    windows = [run.window(checkpoints, *of) for run in runs for of in run.windows(checkpoints)]
    count = sum(window.target is not None for window in windows)
    if not count:
        raise UsageError(
            f"--distance: all windows of {checkpoints} checkpoints end at Θ0, and none of the "
            "forgettings has it trained on more data; give fewer --checkpoints than there are "
            "sessions, or collect with --regime chain, which records that"
        )
    talk.notice(f"--distance: {count} of {counted(len(windows), 'window')} have a target")


def _line(progress: Progress, steps: int, what: str) -> str:
    parts = [f"step {progress.step} of {steps}", f"{progress.seconds:.0f} s"]
    for group, table in progress.gains.items():
        found = table.to_json()
        base, best = next(iter(found["ahead"])), best_average_of(found)
        points, ahead = (
            _text(one) for one in (found["accuracy"][table.taught], found["ahead"][best])
        )
        title = _GROUPS[group].format(what)
        parts.append(f"{title}: {points} points over {base}, {ahead} over {best}")
    return "; ".join(parts)


def _tables(facts: Mapping[str, Any]) -> list[RenderableType]:
    """One table per group of what was held out."""
    from know_cli.cli.tables import new_table

    lines: list[RenderableType] = [_heading(facts)]
    kind = TrajectoryKind(facts["trajectory"])
    for group, found in facts["gains"].items():
        table = new_table(*_columns(facts))
        for cells in _rows(found):
            table.add_row(*cells)
        lines += ["", _GROUPS[group].format(kind.counted(found["runs"])), table]
    return lines


def _heading(facts: Mapping[str, Any]) -> str:
    kind = TrajectoryKind(facts["trajectory"])
    unit, units = kind.unit, kind.units
    return (
        f"Accuracy and cross entropy over {_BASES[kind.value]}, on samples that the {units} have "
        f"not seen; mean over {units} held out ± 95 % interval; ahead: taught one − this, {unit} "
        f"by {unit}"
    )


def network_markdown(facts: Mapping[str, Any]) -> str:
    """What a training through networks gained, and how that grew, as Markdown.

    Args:
        facts: what ``--json`` writes.
    """
    settings, gains = facts["settings"], facts["gains"]
    kind = TrajectoryKind(facts["trajectory"])
    what = kind.units
    base = next(iter(next(iter(gains.values()))["ahead"]))
    # Bundles that were taught before an option was there have none of it.
    calibrated = ", logits at their best temperature" if settings.get("calibrated") else ""
    roles = ", reading roles" if settings.get("roles") else ""
    distance = f", with {settings['distance']:g} of the distance" if settings["distance"] else ""
    if distance and facts["trajectory"] == TrajectoryKind.FORGETTING.value:
        distance += " to weights of more data"
    if settings.get("downstream"):
        distance += (
            f", with {settings['downstream']:g} of the loss on another task after "
            f"{counted(settings['downstream_steps'], 'step')}"
        )
    if settings.get("downstream_examples"):
        numbers = " or ".join(map(str, settings["downstream_examples"]))
        distance += f" on {numbers} examples of it"
    lines = [
        f"# The hyper-model for {what}, taught through the networks",
        "",
        f"{settings['checkpoints']} checkpoints, {_size(facts)} ({facts['digest']}), taught on "
        f"{kind.counted(len(facts['taught_on']))} in {counted(settings['steps'], 'step')} of "
        f"{kind.counted(settings['runs'])}{calibrated}{roles}{distance}; "
        f"{facts['processor_seconds']} s of one processor with all measurements.",
        "",
        f"{_heading(facts)}.",
    ]
    for group, found in gains.items():
        title = _GROUPS[group].format(kind.counted(found["runs"]))
        lines += ["", f"## {title}", "", _line_of(_columns(facts))]
        lines += ["|---|---:|---:|---:|---:|", *map(_line_of, _rows(found))]
    if not facts["curve"]:
        return "\n".join(lines) + "\n"
    lines += ["", "## Gain against effort", ""]
    names = [
        f"{what if group == 'runs' else group}: {over}"
        for group in gains
        for over in (f"points over {base}", "over the best mean")
    ]
    lines += [_line_of(["step", "training loss", *names]), "|---:|" + "---:|" * (len(names) + 1)]
    for point in facts["curve"]:
        cells = [str(point["step"]), f"{point['loss']:+.4f}"]
        for group in gains:
            best = best_average_of(gains[group])
            cells += [_text(point[group]["accuracy"]), _text(point[group]["ahead"][best])]
        lines.append(_line_of(cells))
    return "\n".join(lines) + "\n"


def _columns(facts: Mapping[str, Any]) -> list[str]:
    return [title.format(_model(facts)) for title in _COLUMNS]


def _model(facts: Mapping[str, Any]) -> str:
    """Which hyper-model it is; a manifest of KNOWN does not name it."""
    return str(facts.get("model", HyperModel.KNOWN.value))


def _size(facts: Mapping[str, Any]) -> str:
    settings, parameters = facts["settings"], facts["parameters"]
    if _model(facts) == HyperModel.SETTLE.value:
        return f"{parameters} parameters, a width of {settings['width']}"
    factor = " with a factor on θ0" if settings["factor"] else ""
    steps = settings["predicted_steps"]
    through = f", predictions of 1 to {steps} steps" if steps > 1 else ""
    return (
        f"a KNOWN{factor} of {parameters} parameters for each kind, {settings['preparation']} "
        f"windows{through}"
    )


def best_average_of(found: Mapping[str, Any]) -> str:
    """The name of the average with the highest accuracy in stored gains."""
    names = [name for name in found["ahead"] if name.startswith("average")]
    best: str = max(names, key=lambda name: float(found["accuracy"][name][0]))
    return best


def _rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """The cells of one group's table, from stored gains."""
    for name, accuracy in found["accuracy"].items():
        ahead = ["", ""]
        if name in found["ahead"]:
            ahead = [_text(found["ahead"][name]), _text(found["ahead_loss"][name], 4)]
        yield [name, _text(accuracy), _text(found["loss"][name], 4), *ahead]


def _line_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(stored: Sequence[float | None], digits: int = 2) -> str:
    """A mean with the half width of its interval, which a single run has not."""
    mean, half = stored
    width = "" if half is None else f" ± {half:.{digits}f}"
    return f"{mean:+.{digits}f}{width}"
