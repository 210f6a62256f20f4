"""Configuration, errors, files, console, arithmetic and the machine; imported by all, importing no other part."""
