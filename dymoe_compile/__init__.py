"""The offline compiler: Hugging Face MoE checkpoint -> DyMoE bundle."""
