"""The same measurements inside a training loop, as an optax transformation."""
