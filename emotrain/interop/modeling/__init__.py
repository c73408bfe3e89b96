"""Modelling code that is published: an exported folder carries a copy of each file here, which
transformers runs with `trust_remote_code=True`. Nothing of emotrain imports it, and it imports
torch and transformers alone."""
