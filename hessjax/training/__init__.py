"""Curvature while training: a tracker as an optax transformation, and what to compare its numbers with."""

from hessjax.training._stability import edge_of_stability as edge_of_stability
from hessjax.training._state import CurvatureState as CurvatureState
from hessjax.training._tracker import track_curvature as track_curvature
