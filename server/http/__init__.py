"""The HTTP face: OpenAI's completions, our own `/generate`, the admin API, probes and metrics.

Runs on the event loop. The only folder that knows FastAPI.
"""
