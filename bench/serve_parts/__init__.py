"""The parts of `bench/serve.py`, each run in a process of its own.

served.py      an engine over a real base, with adapters made on the spot
timing.py      contenders in turn, in one process

steps.py, mixes.py, peers.py, registered.py, switch.py, exact.py, soak.py: `run(options)` gives `results` (a row per
contender), `ratios`, and where there is more to say `settings` and `notes`.
"""
