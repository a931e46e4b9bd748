"""Options of ``know train`` that would have no effect, which are refused."""

from __future__ import annotations

import typer

from know_cli.cli.eval_options import is_given, refuse_others
from know_cli.errors import UsageError

# Parameters that only KNOWN's training by weights has, and only training through networks.
_OF_WEIGHTS = {
    "target", "loss", "residuals", "penalty", "epochs", "batch_rows", "averaging",
    "hold_out_data_set", "hold_out_regime", "rows_per_tensor",
}  # fmt: skip
_OF_NETWORK = {
    "data_folder", "meta_steps", "runs_per_step", "hidden", "width", "distance", "downstream",
    "downstream_steps", "downstream_examples", "calibrate", "every",
}  # fmt: skip
# What is done downstream, where that counts.
_OF_DOWNSTREAM = {
    "downstream_steps": "--downstream-steps",
    "downstream_examples": "--downstream-examples",
}
# How to train, whatever the objective.
_OF_TRAINING = {"checkpoints", "learning_rate", "seed", "holdout", "hold_out_architecture"}
# Of the hyper-model: refused through networks where what a bundle has is known.
_OF_MODEL = {"preparation", "steps"}


def check_options(context: typer.Context, *, through_networks: bool, measured: bool) -> None:
    """Refuse options that would have no effect.

    Args:
        context: of the command.
        through_networks: whether the objective is the networks'.
        measured: whether a bundle is measured, and nothing trained.

    Raises:
        UsageError: the first of them.
    """
    every = {parameter.name or "" for parameter in context.command.params}
    objective = f"--objective {'network' if through_networks else 'weights'}"
    refuse_others(context, every - (_OF_WEIGHTS if through_networks else _OF_NETWORK), objective)
    if measured:
        more = set() if through_networks else _OF_MODEL
        of_network = _OF_NETWORK - {"data_folder", "hidden", "width"}
        refuse_others(
            context, every - (_OF_TRAINING | _OF_WEIGHTS | of_network | more), "--evaluate"
        )
    if not context.params["downstream"]:
        for name, option in _OF_DOWNSTREAM.items():
            if is_given(context, name):
                raise UsageError(f"{option} needs --downstream")
