"""Fixtures of wider scopes that leak: each is judged when its scope ends, and no test before."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from tests.suites.shop import COUNT, KEPT


def made(engine: Engine) -> Session:
    session = Session(engine)
    KEPT.append(session)
    session.scalar(COUNT)
    return session


@pytest.fixture(scope="session")
def of_the_session(engine: Engine) -> Session:
    return made(engine)


@pytest.fixture(scope="module")
def of_the_module(engine: Engine) -> Session:
    return made(engine)


class TestClass:
    @pytest.fixture(scope="class")
    @classmethod
    def of_the_class(cls, engine: Engine) -> Session:
        return made(engine)

    def test_one(self, of_the_class: Session, of_the_module: Session, of_the_session: Session) -> None:
        of_the_class.scalar(COUNT)

    def test_two(self, of_the_class: Session, of_the_module: Session) -> None:
        of_the_class.scalar(COUNT)


def test_three(of_the_module: Session) -> None:
    of_the_module.scalar(COUNT)
