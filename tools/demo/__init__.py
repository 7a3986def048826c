"""``make demo``: two vLLM engines split one request over kvlink, next to a single engine that does it alone."""
