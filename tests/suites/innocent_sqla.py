"""A test with the session of pytest-sqla, which is not there for Python 3.10."""

from __future__ import annotations

from sqlalchemy.orm import Session

from tests.suites.shop import COUNT, Order


def test_pytest_sqla(sqla_session: Session) -> None:
    sqla_session.add(Order(item="sqla"))
    sqla_session.commit()
    assert sqla_session.scalar(COUNT) == 1
