"""A package with the interface of litgpt, for tests."""
