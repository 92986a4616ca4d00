"""Serving: one base, many adapters, mixed in one batch.

store.py    adapters on disk, loaded and evicted by bytes; leases of immutable generations
rows.py     the adapters' low-rank products for the token rows of one step
engine.py   what an engine takes and gives: Sampling, Stream of Token and End, the Engine protocol
bridge.py   the seam to transformers' continuous batching
plain.py    a slower engine for what the bridge cannot serve
"""
