"""The only modules that touch the APIs of vLLM and DeepSpeed.

`vllm.engine` runs one rollout engine, `vllm.worker` is the code inside vLLM's own processes, `weight_transfer` moves
weights from learner to engines, `deepspeed` sets up training. Nothing here imports vLLM or DeepSpeed until it is used.
"""
