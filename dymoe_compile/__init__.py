"""The offline compiler: Hugging Face MoE checkpoint -> DyMoE bundle."""

import dymoe_runtime as dymoe_runtime  # before torch: keeps its idle threads from spinning
