"""`python -m megacoder`: the same entry as the console script, and what torchrun starts on every rank."""

from megacoder.cli.main import main

if __name__ == "__main__":
    main()
