"""KNOWN as the paper's authors run it: a Keras model and one ``predict`` in batches of 100,000."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from know_cli.known.module import FEATURES, HIDDEN, NEGATIVE_SLOPE, SQUEEZED

_LAYERS = {
    "input": HIDDEN,
    "squeeze": SQUEEZED,
    "linear": HIDDEN,
    "amplitude": HIDDEN,
    "rate": HIDDEN,
    "output": FEATURES,
}


def keras_predictor(
    state: dict[str, Tensor], checkpoints: int, threads: int
) -> Callable[[Tensor, int], Any] | None:
    """A function of ``[S, rows]`` float32 windows and a batch size that gives the predictions.

    Returns:
        None where ``tf_keras`` is not installed. The answers are ``[rows]`` float32.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    try:
        import tensorflow as tf
        import tf_keras
    except ImportError:
        return None
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        pass  # it runs already, with the number that it was given first
    model = _model(tf, tf_keras, checkpoints)
    for layer in model.layers:
        name = layer.name.replace("_", ".")
        if f"{name}.weight" in state:
            layer.set_weights([state[f"{name}.weight"].T.numpy(), state[f"{name}.bias"].numpy()])

    def predict(history: Tensor, batch: int) -> Any:
        windows = history.T.numpy()
        change = model.predict(
            [windows, windows[:, 1:] - windows[:, :-1]], batch_size=batch, verbose=0
        )
        return windows[:, -1] + change[:, 0]

    return predict


def _model(tf: Any, tf_keras: Any, checkpoints: int) -> Any:
    layers = tf_keras.layers

    def stream(name: str, size: int) -> tuple[Any, Any]:
        def dense(which: str, **wishes: Any) -> Any:
            return layers.Dense(_LAYERS[which], name=f"{name}_{which}", **wishes)

        values = tf_keras.Input((size,))
        x = dense("input")(values)
        z = dense("squeeze", activation="relu")(x)
        exponential = tf.exp(layers.Multiply()([dense("rate")(z), x]))
        law = layers.Multiply()([dense("amplitude")(z), exponential])
        y = layers.Add()([dense("linear")(z), law])
        return values, layers.LeakyReLU(NEGATIVE_SLOPE)(dense("output")(y))

    window, of_window = stream("window", checkpoints)
    differences, of_differences = stream("difference", checkpoints - 1)
    joined = layers.Concatenate()([of_window, of_differences])
    change = layers.Dense(1, activation="tanh", name="head")(joined)
    return tf_keras.Model([window, differences], change)
