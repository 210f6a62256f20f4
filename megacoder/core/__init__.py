"""Configuration, errors, files, console, arithmetic and the machine; imported by everything, importing nothing."""
