"""A network trained in TensorFlow, saved, and its Hessian's spectrum computed in JAX.

Keras takes one backend per process, so TensorFlow trains in a process of its own and leaves a file. You will see how
far the port's outputs are from TensorFlow's, and the three largest eigenvalues beside SciPy's answer over TensorFlow's
nested tapes. Takes 60 s on two cores. Needs `pip install 'hessjax[tensorflow,examples]'`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits

import hessjax as hj


def load_data() -> tuple[np.ndarray, np.ndarray]:
    """400 handwritten digits, 8 by 8."""
    digits = load_digits()
    return (digits.data[:400] / 16).astype(np.float32), digits.target[:400]


def train(folder: Path) -> None:
    """In TensorFlow: trains, saves, and keeps its own outputs and eigenvalues."""
    import keras
    import tensorflow as tf

    x, y = load_data()
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, "tanh"), keras.layers.Dropout(0.1), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=100, epochs=15, verbose=0)
    model.save(folder / "model.keras")

    weights = model.trainable_variables
    ends = np.cumsum([int(np.prod(w.shape)) for w in weights])

    @tf.function
    def product(vector: tf.Tensor) -> tf.Tensor:
        parts = [
            tf.reshape(p, w.shape) for p, w in zip(tf.split(vector, np.diff(ends, prepend=0)), weights, strict=True)
        ]
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=False))
            slopes = [s / len(y) for s in inner.gradient(losses, weights)]
            along = tf.add_n([tf.reduce_sum(s * p) for s, p in zip(slopes, parts, strict=True)])
        return tf.concat([tf.reshape(p, [-1]) for p in outer.gradient(along, weights)], 0)

    matrix = LinearOperator(
        (ends[-1], ends[-1]), lambda v: product(np.float32(v.reshape(-1))).numpy(), dtype=np.float32
    )
    values = eigsh(matrix, 3, which="LA", tol=1e-5, return_eigenvectors=False)
    np.savez(folder / "tensorflow.npz", outputs=model(x, training=False), eigenvalues=np.sort(values))


def main() -> None:
    """Trains in another process, loads under JAX, proves, solves, and compares."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([sys.executable, __file__, "train", folder], env=environment, check=True)
        said = np.load(Path(folder) / "tensorflow.npz")
        model = hj.from_tensorflow(
            Path(folder) / "model.keras", load_data(), optax.losses.softmax_cross_entropy_with_integer_labels
        )
    model.verify(outputs=said["outputs"], rtol=1e-5)
    print(f"{model.parity}\nand the outputs are TensorFlow's to 1e-5\n")
    pairs = hj.eigsh(model.hessian(), k=3, key=jax.random.key(0), which="LA", tol=1e-4)
    print("eigenvalue   SciPy over TensorFlow")
    for ours, theirs in zip(pairs.eigenvalues, said["eigenvalues"], strict=True):
        print(f"{ours:10.5f}   {theirs:21.5f}")
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(pairs.eigenvalues, said["eigenvalues"], rtol=1e-3)


if __name__ == "__main__":
    train(Path(sys.argv[2])) if sys.argv[1:2] == ["train"] else main()
