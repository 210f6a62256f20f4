"""Reads a page as a browser would, for the tests of reports."""

import html.parser


class Reader(html.parser.HTMLParser):
    """Texts, and what could make a browser fetch something."""

    def __init__(self):
        super().__init__()
        self.texts, self.sources, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())
