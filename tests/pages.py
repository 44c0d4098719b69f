"""A page as a test reads it: its elements, its scripts and styles, and its words."""

import json
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.raw, self.text, self.stack = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        if tag not in ("span", "b", "a"):  # everything else ends a word
            self.text.append(" ")

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("script", "style"):
            self.raw[-1][2] += data
        else:
            self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def charts(self) -> dict:
        return next(json.loads(text) for _, attrs, text in self.raw if attrs.get("id") == "charts")
