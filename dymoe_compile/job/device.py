"""The memory budget of a bundle on a profile's device."""

from __future__ import annotations

from dymoe_compile.job.profile import DEVICE_PROCESS_BYTES, Profile
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.kernels.interface import Kernels

# Tokens of context for which the profile's memory is checked.
PROFILE_CONTEXT = 2048


def profile_budget(bundle: Bundle, profile: Profile, kernels: Kernels) -> Budget:
    """Return the memory budget of a run on the profile's device."""
    context = min(PROFILE_CONTEXT, bundle.spec.max_context)
    return plan_budget(bundle, kernels, context, profile.memory_bytes, process_bytes=DEVICE_PROCESS_BYTES)
