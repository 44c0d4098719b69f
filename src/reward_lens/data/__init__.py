"""Preference data: pairs, lists and style items, from memory, a file or the hub, checked row by row.

A prompt is one user turn (a string) or a conversation that ends with one; its hash, `prompt_key`, is the
cluster of every interval and test. A row that cannot be used raises `DataError` with file, line and field;
one that is odd but usable (an empty response, a repeated id or prompt) is kept and named in `Pairs.notes`.
"""

from reward_lens.data.items import Group, Pair, Pairs, StyleItem, as_messages, as_pairs, by_prompt, inputs_hash
from reward_lens.data.loading import load_groups, load_pairs, load_solutions, load_style_items

__all__ = [
    "Group",
    "Pair",
    "Pairs",
    "StyleItem",
    "as_messages",
    "as_pairs",
    "by_prompt",
    "inputs_hash",
    "load_groups",
    "load_pairs",
    "load_solutions",
    "load_style_items",
]
