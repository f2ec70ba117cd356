"""Prefect flows over the DVC graph of a workspace."""
