"""Policy-gradient algorithms in plain torch: advantages, losses, packing, staleness. No Ray, vLLM or DeepSpeed here."""
