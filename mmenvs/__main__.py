"""``python -m mmenvs`` is the command ``mmenvs``; so ``accelerate launch -m mmenvs`` starts it in several processes."""

from mmenvs.cli import app

if __name__ == "__main__":
    app(prog_name="mmenvs")
