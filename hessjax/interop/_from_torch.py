"""The doors to PyTorch. It is imported when one of them is called, not before."""

from typing import Any

from hessjax.interop._jax_source import missing
from hessjax.interop._parity import Ported, check_verify
from hessjax.operators import Operator


def from_torch(
    module: Any,
    data: Any,
    loss: Any,
    *,
    verify: Any = "gradient",
    backend: Any = "export",
    rules: Any = None,
    output: Any = None,
    forward: Any = None,
    **kwargs: Any,
) -> Ported:
    """Makes a `Model` of a PyTorch module, by its exported graph, and proves it faithful.

    `torch.export` records the module's operations in eval mode, for any batch size; each is replaced by its JAX
    equivalent, and what comes out is a plain JAX function. The user's module, its training flag, and torch's random
    state, default dtype and device are left as they were; weights are copied. The port and PyTorch are then compared
    on up to 8 examples spread over the data, in float64 even for a float32 module, where it can run so; with x64 off,
    their outputs once more in the dtypes that the port will have; and where the module switches derivatives off, at
    other parameters too. Attention is computed by its formula and transformer layers by their parts, in the port and in
    the comparison: torch's fused kernels have no second derivative. The second derivative is JAX's own, so that it is
    right where torch's is wrong (`weight_norm`).

    Args:
        module: a `torch.nn.Module` on the CPU; under `torch.compile`, the module inside counts. A Hugging Face model's
            output is its `logits`.
        data: `(inputs, targets)` as tensors or arrays (of NumPy, float64 counts as float32 while x64 is off), the
            examples on the leading axis, or a Dataset or DataLoader of such pairs, read once. A tuple of inputs is
            several arguments, a dict named ones. Of batches that are dicts, `labels` is the target.
        loss: `loss(output, target)`, a scalar: in JAX on one example, as those of `optax.losses`; or PyTorch's on a
            batch, such as `nn.CrossEntropyLoss()`, which is converted too, and has to be a mean over the examples
            (no class weights, no `ignore_index`), of the outputs alone (no penalty on the parameters).
        verify: what is compared with PyTorch: `"gradient"` (with outputs and loss), `"output"` or False.
        backend: `"export"`, the only one.
        rules: operation's name (`"aten.erf.default"`, `"mylib.op"`) → function of JAX arrays with its signature, for
            operations without a rule, or in place of one.
        output: selects what counts as the output from what the module returns: tensors, in a tuple, list or dict, all
            of whose keys are kept.
        forward: `forward(params, x)` on one example, written by hand in JAX, to be used and compared in place of the
            conversion. Frozen parameters and buffers are its own affair.
        kwargs: further arguments of the module's forward, such as `use_cache=False`.

    Returns:
        A `Model` whose `params` are a flat dict keyed as `module.named_parameters()`: those with `requires_grad`, a
        shared one once. Frozen ones and buffers are constants. `model.parity` says what was compared and how far apart.

    Raises:
        ImportError: PyTorch is not installed.
        TypeError: the module is none, or a parameter is not real.
        ValueError: the module is not on the CPU, batches have unequal structure, a float64 module, or one with
            float64 or int64 arithmetic that matters, meets JAX's x64 switched off, or port and source disagree.
        NotImplementedError: what does not convert, by name of operation and layer: no rule, a branch on values, a write
            in place to a buffer or an input, a custom autograd function, random numbers, statistics of the batch.
            `hj.torch_operator` is the way out.
    """
    check_verify(verify, "from_torch")
    if backend != "export":
        raise ValueError(
            f'`from_torch` takes `backend="export"`, got {backend!r}. The published torchax does not import with torch '
            "2.13, and importing it breaks `torch.compile` and other torch code."
        )
    try:
        import torch  # noqa: F401  the adapter needs it, and its absence is told here
    except ImportError as error:
        raise missing("from_torch", "PyTorch", "torch") from error
    from hessjax.interop._torch._adapter import convert

    return convert(module, data, loss, verify, rules, output, forward, kwargs)


def torch_operator(loss_fn: Any, module: Any, batches: Any) -> Operator:
    """The Hessian by PyTorch's own double backward, as an `Operator`. For what `hj.from_torch` does not convert.

    Every product is a round trip to the host: JAX iterates, PyTorch computes. It runs under `jit`, `scan` and `vmap`
    (one vector after another), but cannot be differentiated. Attention runs by its formula there, since the fused
    kernels have no second derivative.

    Args:
        loss_fn: `loss_fn(module(inputs), targets)`, a scalar tensor: the mean over the examples of a batch.
        module: a `torch.nn.Module`, on any device. Copied, in eval mode.
        batches: pairs `(inputs, targets)`: a list of them, or a DataLoader, read once. A tuple of inputs is several
            arguments, a dict named ones. The loss is the mean over all examples, so batches weigh by their length.

    Returns:
        An `Operator` on flat dicts keyed as `module.named_parameters()`, those with `requires_grad`.

    Raises:
        ImportError: PyTorch is not installed.
        TypeError: the module is none.
        ValueError: there is no batch, nothing to train, a float64 module meets JAX's x64 switched off, the first batch
            does not run, or the loss is no scalar or depends on the module's parameters by itself, as by a penalty.
    """
    try:
        import torch  # noqa: F401  as above
    except ImportError as error:
        raise missing("torch_operator", "PyTorch", "torch") from error
    from hessjax.interop._torch._operator import build

    return build(loss_fn, module, batches)
