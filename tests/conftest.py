"""Lets every test import `support.*`, keeps JAX on the CPU and compiled programs between runs."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time of these tests; `build/` is not tracked.
_PROGRAMS = Path(__file__).parents[1] / "build" / "test_programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
sys.path.insert(0, str(Path(__file__).parent))
