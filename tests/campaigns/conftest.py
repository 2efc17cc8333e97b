"""The campaigns are commands: their tests share what the tests of scripts/ share."""

from tests.scripts.conftest import logging_as_before, server

__all__ = ["logging_as_before", "server"]
