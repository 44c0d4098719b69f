"""`python -m reward_lens` is the command `reward-lens`."""

from reward_lens.cli import app

if __name__ == "__main__":
    app(prog_name="reward-lens")
