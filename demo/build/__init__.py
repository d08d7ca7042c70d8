"""How the bundled demo was made: corpus, tokenizer, base model, tasks, prefixes.

Run as ``python -m demo.build``; nothing here is imported by the server. Every step is seeded and
uses the standard library, torch, transformers, tokenizers and safetensors only.
"""
