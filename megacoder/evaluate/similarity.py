"""How similar two texts are, in characters: by edit distance, and by longest common subsequence."""

__all__ = ["common_ratio", "edit_similarity"]


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


def common_ratio(a: str, b: str) -> float:
    """2 * longest common subsequence / sum of both lengths; 1 for two empty strings."""
    if not a or not b:
        return float(a == b)
    import numpy as np

    codes = np.array([ord(character) for character in b])
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for character in a:
        matched = np.maximum(row[1:], np.where(codes == ord(character), row[:-1] + 1, 0))
        row[1:] = np.maximum.accumulate(matched)
    return float(2 * row[-1] / (len(a) + len(b)))
