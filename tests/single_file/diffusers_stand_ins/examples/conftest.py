"""Stands in for diffusers' examples/conftest.py, which lets tests find the clone's own sources and a few options."""
