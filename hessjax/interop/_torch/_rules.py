"""The table of rules: what each ATen operation is in JAX.

A rule has its operation's signature, with arrays for tensors and NumPy dtypes for torch's. It is found by the
operation's full name (`aten.max.dim`) or without the overload (`aten.max`). The modules beside this one fill the table,
one family each; PyTorch itself is not needed to read them.
"""

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}

RANDOM = "it draws random numbers; switch to a forward without them (dropout belongs in train mode)"
DYNAMIC = "the shape of its result depends on values; compute with a mask and `torch.where` instead"

# What has no rule, and cannot have one.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("native_dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "randint"), RANDOM),
    **dict.fromkeys(("randperm", "normal", "multinomial", "uniform", "rrelu_with_noise"), RANDOM),
    **dict.fromkeys(("rrelu_with_noise_functional", "poisson", "exponential", "geometric"), RANDOM),
    **dict.fromkeys(("nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim"), DYNAMIC),
    "_local_scalar_dense": "it reads a number out of a tensor (`.item()`, `float()`, `if`), which no compiled "
    "program can; use `torch.where`",
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Files the decorated function under ATen names, given without the prefix."""

    def file(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return file


def find(name: str, extra: dict[str, Rule]) -> Rule | None:
    """The rule for an operation such as `aten.max.dim`, the user's before ours."""
    short = name.rpartition(".")[0]
    for table in (extra, RULES):
        if name in table or short in table:
            return table.get(name) or table[short]
    return None


def why_refused(name: str) -> str | None:
    """Why an operation can have no rule, or None."""
    return REFUSED.get(name.split(".")[1]) if name.startswith("aten.") else None
