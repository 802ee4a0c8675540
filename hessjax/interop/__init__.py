"""From and to the neighbours: other frameworks' models, and SciPy."""

from hessjax.interop._check import check_hvp as check_hvp
from hessjax.interop._equinox import from_equinox as from_equinox
from hessjax.interop._flax import from_flax as from_flax
from hessjax.interop._haiku import from_haiku as from_haiku
from hessjax.interop._scipy import as_scipy as as_scipy
