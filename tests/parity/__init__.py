"""Comparisons with independent implementations, and with the golden tokens they made."""
