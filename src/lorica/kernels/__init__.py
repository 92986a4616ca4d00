"""The fast paths, each exact and beside its plain reference."""
