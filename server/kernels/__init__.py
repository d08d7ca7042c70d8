"""GPU kernels in Triton: each file holds kernel, launcher, shapes, and the torch line that it must equal."""
