"""Import edges found by independent means, one module per language; see tools/check_imports.py."""
