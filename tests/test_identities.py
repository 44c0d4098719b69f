"""Every identity of the exactness contract on every backbone class and every kind of readout, in both precisions."""

import numpy as np
import pytest

from identities import DTYPES, MODELS, gaps, model_of, over_limit, precisions

ALWAYS = ("E1", "E2 lens", "E2 sum", "E4", "E9")  # what no model may refuse


@pytest.mark.parametrize("name, precision", [(name, precision) for name in MODELS for precision in precisions(name)])
def test_identities(name, precision):
    found = gaps(model_of(name, DTYPES[precision]))
    assert not over_limit(found, precision)
    assert not [identity for identity in ALWAYS if np.isnan(found[identity])]
