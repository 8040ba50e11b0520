"""Patches: what a package holds, whether it may be applied, and applying it."""
