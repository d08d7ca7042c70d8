"""KV memory: which blocks exist, which prefixes are resident, and the tensors themselves."""
