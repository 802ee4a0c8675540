"""From an operator to densities, traces, diagonals and counts: every number with its error."""

from hessjax.estimate._density import Density as Density
from hessjax.estimate._diagonal import Diagonal as Diagonal
from hessjax.estimate._diagonal import diagonal as diagonal
from hessjax.estimate._frobenius import frobenius_norm as frobenius_norm
from hessjax.estimate._result import Estimate as Estimate
from hessjax.estimate._spectral_density import spectral_density as spectral_density
from hessjax.estimate._trace import trace as trace
from hessjax.estimate._trace_of import logdet as logdet
from hessjax.estimate._trace_of import trace_of as trace_of
