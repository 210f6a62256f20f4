"""How similar two texts are, in characters."""

__all__ = ["edit_similarity"]


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer, in characters; 1 for two empty strings."""
    if a == b:
        return 1.0
    import numpy as np  # late: the import is slow, and benchmarks that run programs compare no texts

    characters, columns = np.array([ord(character) for character in b]), np.arange(len(b) + 1)
    distances = columns
    for row, character in enumerate(a, start=1):
        kept_or_replaced = distances[:-1] + (characters != ord(character))
        without_inserting = np.concatenate(([row], np.minimum(kept_or_replaced, distances[1:] + 1)))
        # an insertion costs one per column: subtract the columns, take the running minimum, add them again
        distances = np.minimum.accumulate(without_inserting - columns) + columns
    return 1.0 - int(distances[-1]) / max(len(a), len(b))
