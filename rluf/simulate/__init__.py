"""A population of users with hidden taste: the ground truth of experiments. No ray, vllm or deepspeed here."""
