"""The model: loading it, running one step of it, sampling from it."""
