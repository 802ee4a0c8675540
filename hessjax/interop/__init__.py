"""From and to the neighbours: other frameworks' models, and SciPy."""

from hessjax.interop._scipy import as_scipy as as_scipy
