"""From and to the neighbours: other frameworks' models, SciPy and lineax."""

from hessjax.interop._lineax import as_lineax as as_lineax
from hessjax.interop._scipy import as_scipy as as_scipy
