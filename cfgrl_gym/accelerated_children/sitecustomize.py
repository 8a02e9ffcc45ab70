"""Accelerates LIBERO in the Python processes that an accelerated program starts.

Python imports a `sitecustomize` at its start, the first on its path; the next one is run as well.
"""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_others = [folder for folder in sys.path if os.path.abspath(folder or ".") != _here]
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))

try:
    from cfgrl_gym.envs.acceleration import accelerate_libero
except ImportError:  # another Python than the program's
    pass
else:
    accelerate_libero()
