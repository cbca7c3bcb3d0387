"""What the site reads docstrings by: they are written as transformers' are, and Griffe reads Google's style."""

import re

import griffe

TYPE = re.compile(r"(?m)^(\s+[*\w`, ]+ )\((`[^)\n]*)\):")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


class AsInTransformers(griffe.Extension):
    """Types stand in backticks, and names of objects in brackets, which Markdown takes for no link."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = TYPE.sub(lambda found: f"{found[1]}({re.sub('[`*]', '', found[2])}):", obj.docstring.value)
            obj.docstring.value = REFERENCE.sub(r"`\1`", text)
