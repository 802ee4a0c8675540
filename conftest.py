"""Which modules are searched for doctests: not those that import a framework which is not installed."""

import importlib.util

collect_ignore_glob = ["tests/interop/fixtures/*"]
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob.append("hessjax/interop/_torch/*")
