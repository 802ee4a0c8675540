"""From an operator to eigenpairs, and to solutions of linear systems."""

from hessjax.krylov._eigenpairs import Eigenpairs as Eigenpairs
from hessjax.krylov._eigsh import eigsh as eigsh
from hessjax.krylov._lanczos import Lanczos as Lanczos
from hessjax.krylov._lanczos import lanczos as lanczos
from hessjax.krylov._memory import memory_estimate as memory_estimate
from hessjax.krylov._solve import Solution as Solution
from hessjax.krylov._solve import solve as solve
