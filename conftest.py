"""Which modules are searched for doctests: not those that import a framework which is not installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["hessjax/interop/_torch/*"]
