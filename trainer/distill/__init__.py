"""Distillation of a document into a prefix: conversations about it by the base itself, and training on its logits.

`distillation` is the face; `cli_distill` is its command.
"""
