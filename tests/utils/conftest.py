"""How Hypothesis runs in the tests of utils/."""

from __future__ import annotations

import os

from hypothesis import settings

# The same examples each time in `make check`; HYPOTHESIS_PROFILE=soak searches for new ones.
settings.register_profile("check", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("soak", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))
