"""Foreign formats that a server takes in: recognised by tensors and geometry, turned into native artifacts.

Safetensors only. Whatever needs a pickle reader is in `converter`, which no server process imports.
"""
