"""Commands about embeddings: ``mmenvs pretrain | embed | compare``. ``mmenvs.cli`` registers them."""

from __future__ import annotations

from mmenvs.cli import app, user_errors

__all__ = ["app", "user_errors"]
