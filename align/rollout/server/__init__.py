"""vLLM servers as the rollout engine: started by `align serve`, given weights and asked for completions over HTTP."""
