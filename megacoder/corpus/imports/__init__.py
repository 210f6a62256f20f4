"""Which files of a repository each of its files imports: one resolver per language family."""
