"""Reward heads that were published with code of their own, as classes of this library: the checkpoint's weights are
loaded into them, and no remote code is run.

`table` says which checkpoint is which; `own` is what they share: a transformers trunk, a head under the published
names, and `.logits` as a sequence classifier gives them.
"""

from reward_lens.model.heads.own import complete as complete
from reward_lens.model.heads.own import tokenizer_options as tokenizer_options
from reward_lens.model.heads.table import causal_of as causal_of
from reward_lens.model.heads.table import load_known as load_known
from reward_lens.model.heads.table import without_report as without_report
