"""Weight sync from the learner to the engines, one module per transport (sender and receiver); factory selects one."""
