"""Files not written in this repository: vendored copies, by folder or name; minified code, by name or layout.

The paper drops neither by name (its limits on line length catch most minified code); these are options.
"""

import re
from dataclasses import dataclass

from megacoder.corpus.documents import Document, Dropped

__all__ = ["MinifiedFiles", "VendoredFiles", "is_minified", "is_vendored"]

_VENDOR_FOLDERS = frozenset(
    {
        "node_modules", "bower_components", "jspm_packages", "vendor", "vendors", "vendored", "_vendor", "third_party",
        "third-party", "thirdparty", "3rdparty", "3rd_party", "3rd-party", "godeps", "pods", "carthage",
        "site-packages", "dist-packages", "externals", ".yarn", ".cargo",
    }
)  # fmt: skip
_VENDOR_NAMES = re.compile(
    r"(?:jquery(?:[-.]ui)?|bootstrap|angular|react(?:-dom)?|vue|lodash|underscore|backbone|d3|moment|modernizr|ember|knockout"
    r"|prototype|mootools|three|popper|require)(?:[-.]\d[\d.]*)?(?:[.-](?:slim|bundle|full|esm|common))*(?:[.-]min)?\.(?:js|css)"
)
_MINIFIED_NAME = re.compile(r"[.-]min\.(?:js|mjs|cjs|css|html)$")
_MINIFIED_LANGUAGES = frozenset({"JavaScript", "CSS"})
_MIN_SPACE = 0.06  # share of characters; 15 to 30 percent were measured in JavaScript and CSS laid out by people
_MIN_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class VendoredFiles:
    """The stage that drops copies of other projects."""

    name: str = "vendored"

    def __call__(self, document: Document) -> Document | Dropped:
        return document.dropped(self.name, "vendored copy") if is_vendored(document.path) else document


@dataclass(frozen=True, kw_only=True)
class MinifiedFiles:
    """The stage that drops minified code."""

    name: str = "minified"

    def __call__(self, document: Document) -> Document | Dropped:
        packed = is_minified(document.path, document.language, document.text)
        return document.dropped(self.name, "minified") if packed else document


def is_vendored(path: str) -> bool:
    """Whether a file of this path was copied from another project."""
    *folders, name = path.lower().split("/")
    return not _VENDOR_FOLDERS.isdisjoint(folders) or _VENDOR_NAMES.fullmatch(name) is not None


def is_minified(path: str, language: str, text: str) -> bool:
    """Whether a file says in its name that it is minified, or is JavaScript or CSS with next to no white space."""
    if _MINIFIED_NAME.search(path.lower()):
        return True
    if language not in _MINIFIED_LANGUAGES or len(text) < _MIN_CHARS:
        return False
    return sum(map(text.count, " \t\n")) < _MIN_SPACE * len(text)
