"""A word that an option does not have is refused by every public function, and so is a count below one."""

import json
import subprocess
import sys
from pathlib import Path


def test_no_unknown_word_is_taken():
    """Without the tests' type checker, as a user calls them."""
    script = Path(__file__).parent / "option_words.py"
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 100
    for call, raised in found.items():
        said = "max_rows=" if "max_rows" in call else "top=" if call.endswith("top") else "sideways"
        assert said in raised and "What to do:" in raised, (call, raised)
