"""Import edges by other means than ours, one module a language; see tools/check_imports.py."""
