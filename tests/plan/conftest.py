"""Plans are made of the same settings as the trainer's tests."""

from tests.train.conftest import settings

__all__ = ["settings"]
