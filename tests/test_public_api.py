"""The public names, as a list that a change has to touch, and what each of them promises to document."""

import inspect
import re

import pytest

import reward_lens

PUBLIC: list[str] = []  # filled from the front door


def test_the_list_of_public_names():
    assert list(reward_lens.__all__) == PUBLIC


def test_the_list_is_what_can_be_imported():
    assert [name for name in reward_lens.__all__ if not hasattr(reward_lens, name)] == []
    public = {name for name in dir(reward_lens) if not name.startswith("_")}
    assert set(reward_lens.__all__) <= public


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        reward_lens.no_such_name  # noqa: B018


def functions():
    for name in PUBLIC:
        value = getattr(reward_lens, name)
        if inspect.isfunction(value):
            yield pytest.param(value, id=name)


@pytest.mark.parametrize("function", functions())
def test_every_function_says_what_it_returns(function):
    text = inspect.getdoc(function) or ""
    assert re.search(r"\b([Rr]eturns?|[Dd]im(s|ensions)?|[Ss]hapes?)\b", text), "no word on the result or its shape"
