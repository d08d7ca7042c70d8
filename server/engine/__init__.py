"""The engine: one thread that plans and runs steps, and its face towards the event loop."""
