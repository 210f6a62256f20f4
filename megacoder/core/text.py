"""Text that cannot be written: command lines, prompts and documents are refused it by one rule."""

__all__ = ["is_unicode"]


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, as JSON may escape it and undecodable bytes become it: no bytes stand for it."""
    if text.isascii():  # a flag of the string, so it costs nothing
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
