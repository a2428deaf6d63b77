"""The only modules that touch the APIs of vLLM and DeepSpeed.

`vllm` runs one rollout engine, `worker` is our code inside vLLM's own processes, `transfer` is the learner's side of
publishing weights, `deepspeed` sets up training. Nothing here imports vLLM or DeepSpeed until it is used.
"""
