"""prefixd: one resident language model, thousands of tasks, each a learned K/V prefix."""

__version__ = "0.1.0"
