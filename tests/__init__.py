"""The specification as tests; the tree mirrors the package."""
