"""From and to the neighbours: other frameworks' models, and SciPy."""

from hessjax.interop._check import check_hvp as check_hvp
from hessjax.interop._scipy import as_scipy as as_scipy
