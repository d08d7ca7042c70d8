"""`prefixd convert`: prefixes of other programs, also pickled ones, as native artifacts. A process of its own.

No server process imports this package: it can read pickled checkpoints (with `weights_only=True` and an
allow-list), which no server should be able to. `prefixd convert` starts `python -m converter`.
"""
