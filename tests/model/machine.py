"""The machine that hypothesis drives: it does each step for real and in the oracle, and compares after each."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import event, insert, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from session_watch import SessionWatch, Settings, Severity
from session_watch.current import clock
from session_watch.inbox import ERRORS
from session_watch.testing import watching
from tests.model.actors import Actor, Enter, Leave, LeftByError, Respond, settled
from tests.model.oracle import Life, Oracle, Raw, Row, Transaction, Work

NEVER = 1_000_000.0
SETTINGS = Settings(
    held_too_long=NEVER,
    idle_in_transaction=NEVER,
    held_after_response=NEVER,
    pool_wait=NEVER,
    pool_wait_on_loop=NEVER,
    sweep_interval=10_000.0,
    max_routes=1_000_000,
    rules_off=("sync-session-on-event-loop",),
)
WHO = st.integers(0, 3)
WHICH = st.integers(0, 5)
PLAYERS, SESSIONS, RAWS = 4, 6, 3
numbers = itertools.count(1)


class Base(DeclarativeBase):
    """The metadata of the one table."""


class Item(Base):
    """A row."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


# Below SQLAlchemy 2.0.43 AUTOCOMMIT of a whole engine is not known.
KNOWS_AUTOCOMMIT = hasattr(DefaultDialect, "detect_autocommit_setting")
ITEMS = Base.metadata.tables["items"]


@dataclass
class Stage:
    """Two engines of one database, a third of AUTOCOMMIT, and how to make a session of them."""

    engines: dict[str, Any]
    session: Callable[[Any], Any]
    is_there: Callable[[Row], bool]
    run: Callable[[Any], Any]
    aborts: bool
    one_writer: bool

    def pool(self, name: str) -> Any:
        """The engine's pool."""
        return self.engines[name].pool

    def out(self) -> dict[str, int]:
        """Connections out, by the pools' own account."""
        return {name: self.pool(name).checkedout() for name in self.engines}


@dataclass(eq=False)
class Player:
    """An actor, the work that it inherited and those that it has opened."""

    actor: Actor
    base: Work
    stack: list[Work] = field(default_factory=list)

    @property
    def raw(self) -> Work:
        """The work that its context names, over or not."""
        return self.stack[-1] if self.stack else self.base


@dataclass(eq=False)
class Sut:
    """A session, with what the oracle knows of it and its open savepoints."""

    real: Any
    life: Life
    savepoints: list[Any] = field(default_factory=list)

    @property
    def opened(self) -> Transaction:
        """Its transaction, which is open."""
        assert self.life.transaction is not None
        return self.life.transaction


def _without_frames(error: BaseException) -> BaseException:
    """The error, which no longer leads to the frames in which it was raised, and so to the session.

    Nor do its causes: on Python 3.10 aiosqlite's thread keeps the last one.
    """
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        following = cause.__cause__ or cause.__context__
        cause.__context__ = cause.__cause__ = None
        cause = following
    return error


class Lives(RuleBasedStateMachine):
    """Session lives at random in works at random."""

    stage: ClassVar[Stage]
    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.loop = self.stage.run(None)
        self._start_afresh()
        self.players: list[Player] = []
        self.suts: list[Sut] = []
        self.raws: list[tuple[Any, Raw]] = []
        self.used: Counter[str] = Counter()
        self.faults = dict(ERRORS.internal)
        self.watching = watching(SETTINGS)
        self.watch: SessionWatch = self.watching.__enter__()
        self.oracle = Oracle(self.stage.is_there, self._runs)
        self.nobody = self._new_player("nobody", self.oracle.outside)
        self.players.append(self._new_player(f"actor{next(numbers)}", self.oracle.outside))
        self.taken: list[str] = []
        self.listeners: list[tuple[Any, Callable[..., None]]] = []
        for name in self.stage.engines:
            self._listen(name)

    def _start_afresh(self) -> None:
        """What a life that failed has left out is not this one's."""
        gc.collect()
        gc.freeze()  # else each collection goes through all that Hypothesis keeps of thousands of lives
        for engine in self.stage.engines.values():
            if engine.pool.checkedout():
                self._do(settled(engine.dispose()))

    def _listen(self, name: str) -> None:
        def took(*_: Any) -> None:
            self.taken.append(name)

        event.listen(self.stage.pool(name), "checkout", took)
        self.listeners.append((self.stage.pool(name), took))

    def _runs(self, actor: object) -> bool:
        return isinstance(actor, Actor) and not actor.task.done()

    def _do(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def _new_player(self, name: str, base: Work, by: Player | None = None) -> Player:
        async def made() -> Actor:
            return Actor(name, self.watch, inherits=by is not None)

        actor = self._do(made() if by is None else by.actor.does(made))
        return Player(actor, base)

    # Where and with what

    def player(self, who: int) -> Player:
        """One of those who are there."""
        return self.players[who % len(self.players)]

    def work(self, player: Player) -> Work:
        """The work it is in."""
        return self.oracle.works_of(player.actor, player.raw)

    def sut(self, which: int) -> Sut:
        """One of the sessions."""
        return self.suts[which % len(self.suts)]

    def may_use(self, player: Player, sut: Sut) -> bool:
        """Whether the rules say whose it is: of a request's session in a job that came after it, they do not."""
        work, life = self.work(player), sut.life
        requests = [life.made_in, *([life.transaction.owner] if life.transaction else [])]
        left = any(each.is_request and each.over for each in requests)
        return not (left and work.kind == "job")

    def locked(self, sut: Sut) -> bool:
        """Whether another session has the one write lock of the database."""
        if not self.stage.one_writer:
            return False
        opened = [each.life.transaction for each in self.suts if each is not sut]
        return any(each is not None and each.writing for each in opened)

    def act(self, player: Player, step: Callable[[], Any], sut: Sut | None = None) -> Any:
        """Do something with a session in this actor's task; what it raised, or None."""
        self.steps[step.__name__] += 1
        del self.taken[:]
        before = self.stage.out()
        begun = sut is not None and sut.life.transaction is None

        async def there() -> None:
            await settled(step())

        raised: BaseException | None = None
        try:
            self._do(player.actor.does(there))
        except (DBAPIError, PendingRollbackError, LeftByError) as error:
            raised = _without_frames(error)
        self._took(player, sut, begun)
        del before
        return raised

    def _took(self, player: Player, sut: Sut | None, begun: bool) -> None:
        if sut is None:
            return
        life, work = sut.life, self.work(player)
        if begun and sut.real.in_transaction():
            self.oracle.begun(life, work, player.actor)
        for name in self.taken:
            assert life.transaction is not None
            self.oracle.took(name, work, player.actor)
            life.transaction.holds = life.transaction.connected = True
            life.transaction.checkouts += 1

    # Works

    @precondition(lambda self: len(self.players) < PLAYERS)
    @rule()
    def somebody_comes(self) -> None:
        """Another task, in no work."""
        self.players.append(self._new_player(f"actor{next(numbers)}", self.oracle.outside))

    @precondition(lambda self: len(self.players) < PLAYERS)
    @rule(who=WHO)
    def starts_a_task(self, who: int) -> None:
        """A task that inherits the work."""
        player = self.player(who)
        if self.work(player).kind == "outside":
            return
        self.players.append(self._new_player(f"child{next(numbers)}", player.raw, player))

    @rule(who=WHO, kind=st.sampled_from(["request", "job", "request"]))
    def enters(self, who: int, kind: str) -> None:
        """Open a request or a job."""
        player = self.player(who)
        outer = self.work(player)
        if len(player.stack) > 2 or (kind == "request" and not self._may_request(player)):
            return
        name = f"{kind}{next(numbers)}"
        self._do(player.actor.does(Enter(kind, name)))
        parent = None if outer.kind == "outside" else outer
        if kind == "request":
            work = Work("request", f"POST /{name}", f"/{name}", player.actor, parent)
        else:
            inside = None if parent is None else parent if parent.is_request else parent.request
            work = Work("job", name, f"job:{name}", player.actor, parent, inside)
        player.stack.append(work)

    def _may_request(self, player: Player) -> bool:
        """Requests within requests are no concern of ours."""
        return player.base.kind == "outside" and not any(each.is_request for each in player.stack)

    @rule(who=WHO, how=st.sampled_from(["well", "well", "well", "refused", "raises", "cancelled"]))
    def leaves(self, who: int, how: str) -> None:
        """End the innermost work."""
        player = self.player(who)
        if player.stack:
            self._leave(player, how)

    def _leave(self, player: Player, how: str) -> None:
        work = player.stack[-1]
        if how == "refused" and not work.is_request:
            how = "well"
        if how == "cancelled":
            self._do(player.actor.is_cancelled())
        else:
            status = 409 if how == "refused" else 200
            self._do(player.actor.does(Leave(status, LeftByError if how == "raises" else None)))
            if work.is_request and how != "raises" and work.responded is None:
                work.responded = status
        player.stack.pop()
        fine = how in ("well", "refused") and (not work.is_request or work.responded == 200)
        self.oracle.end(work, succeeded=fine)

    @rule(who=WHO, status=st.sampled_from([200, 200, 500]))
    def responds(self, who: int, status: int) -> None:
        """Send the response, and go on in the background."""
        player = self.player(who)
        if player.stack and player.stack[-1].is_request and player.stack[-1].responded is None:
            self._do(player.actor.does(Respond(status)))
            player.stack[-1].responded = status

    @rule(who=WHO)
    def ends(self, who: int) -> None:
        """A task ends."""
        player = self.player(who)
        if not player.stack and len(self.players) > 1:
            self._end(player)

    def _end(self, player: Player) -> None:
        self.players.remove(player)
        self._do(player.actor.ends())
        work = self.oracle.detached.get(player.actor)
        if work is not None and not work.over:
            self.oracle.end(work, succeeded=True)

    # Sessions

    @precondition(lambda self: len(self.suts) < SESSIONS)
    @rule(who=WHO, engine=st.sampled_from(["one", "one", "other", "autocommit"]))
    def makes(self, who: int, engine: str) -> None:
        """Make a session."""
        player = self.player(who)
        engine = engine if KNOWS_AUTOCOMMIT else "one"
        made: list[Any] = []

        def make() -> None:
            made.append(self.stage.session(self.stage.engines[engine]))

        work = self.work(player)
        self.act(player, make)
        life = self.oracle.made(engine, work, player.actor, autocommit=engine == "autocommit")
        self.suts.append(Sut(made.pop(), life))

    def _ready(self, who: int, which: int) -> tuple[Player, Sut] | None:
        if not self.suts:
            return None
        player, sut = self.player(who), self.sut(which)
        return (player, sut) if self.may_use(player, sut) else None

    @rule(who=WHO, which=WHICH)
    def reads(self, who: int, which: int) -> None:
        """Execute a query."""
        ready = self._ready(who, which)
        if ready is None:
            return
        player, sut = ready

        def read() -> Any:
            return sut.real.execute(text("SELECT 1"))

        self._executes(player, sut, read)

    def _executes(self, player: Player, sut: Sut, step: Callable[[], Any]) -> Any:
        fresh = sut.life.transaction is None
        raised = self.act(player, step, sut)
        if not fresh or not sut.opened.late:
            self.oracle.executed(sut.life, self.work(player), player.actor)
        return raised

    @rule(who=WHO, which=WHICH)
    def writes(self, who: int, which: int) -> None:
        """Insert a row."""
        ready = self._ready(who, which)
        if ready is None or self.locked(ready[1]):
            return
        player, sut = ready
        row = next(numbers)

        def write() -> Any:
            return sut.real.execute(insert(ITEMS).values(id=row))

        if self._executes(player, sut, write) is None:
            self._wrote(sut, row)

    def _wrote(self, sut: Sut, *rows: Row) -> None:
        opened = sut.life.transaction
        assert opened is not None
        opened.levels[-1] += rows
        opened.writing = not sut.life.autocommit

    @rule(who=WHO, which=WHICH)
    def adds(self, who: int, which: int) -> None:
        """Add an object, and do not flush it."""
        ready = self._ready(who, which)
        if ready is None or self._failed(ready[1]):
            return
        player, sut = ready

        def add() -> None:
            sut.real.add(Item(id=next(numbers)))

        self.act(player, add, sut)
        sut.opened.pending += 1

    @rule(who=WHO, which=WHICH)
    def flushes(self, who: int, which: int) -> None:
        """Flush what was added."""
        ready = self._ready(who, which)
        if ready is None or self._failed(ready[1]) or self.locked(ready[1]):
            return
        player, sut = ready
        opened = sut.life.transaction
        if opened is None or not opened.pending:
            return

        def flush() -> Any:
            return sut.real.flush()

        rows = [each.id for each in sut.real.new]
        assert self.act(player, flush, sut) is None
        self.oracle.executed(sut.life, self.work(player), player.actor)
        opened.pending = 0
        self._wrote(sut, *rows)

    @rule(who=WHO, which=WHICH)
    def fails_to_flush(self, who: int, which: int) -> None:
        """Flush a row that is there already."""
        ready = self._ready(who, which)
        if ready is None or self._failed(ready[1]) or self.locked(ready[1]):
            return
        player, sut = ready

        async def fail() -> None:
            sut.real.add(Item(id=0))
            await settled(sut.real.flush())

        def fails() -> Any:
            return fail()

        fresh = sut.life.transaction is None
        raised = self.act(player, fails, sut)
        assert isinstance(raised, IntegrityError), raised
        if not fresh or not sut.opened.late:
            self.oracle.executed(sut.life, self.work(player), player.actor)
        self.oracle.failed(sut.life, flush=True)
        sut.opened.inactive = True
        if len(sut.opened.levels) == 1:
            sut.opened.writing = False

    @rule(who=WHO, which=WHICH)
    def fails(self, who: int, which: int) -> None:
        """Execute a statement that fails."""
        ready = self._ready(who, which)
        if ready is None:
            return
        player, sut = ready

        def wrong() -> Any:
            return sut.real.execute(text("SELECT * FROM nowhere"))

        raised = self._executes(player, sut, wrong)
        assert raised is not None
        opened = sut.opened
        if self.stage.aborts and not sut.life.autocommit and not opened.inactive:
            self.oracle.failed(sut.life, flush=False)

    def _failed(self, sut: Sut) -> bool:
        opened = sut.life.transaction
        return opened is not None and opened.failure is not None

    @rule(who=WHO, which=WHICH)
    def sets_a_savepoint(self, who: int, which: int) -> None:
        """Begin a savepoint, which flushes."""
        ready = self._ready(who, which)
        if ready is None or self._failed(ready[1]) or ready[1].life.autocommit:
            return
        player, sut = ready
        opened = sut.life.transaction
        # Before the first write Python's sqlite3 has no transaction of its own for a savepoint to be in.
        if self.stage.one_writer and (opened is None or not opened.writing):
            return
        rows = [each.id for each in sut.real.new]
        begun: list[Any] = []

        async def set_it() -> None:
            begun.append(await settled(sut.real.begin_nested()))

        def savepoint() -> Any:
            return set_it()

        fresh = opened is None
        assert self.act(player, savepoint, sut) is None
        opened = sut.opened
        if rows:
            self.oracle.executed(sut.life, self.work(player), player.actor)
            opened.pending = 0
            self._wrote(sut, *rows)
        del fresh
        sut.savepoints.append(begun.pop())
        opened.levels.append([])
        opened.failures.append(None)

    @rule(who=WHO, which=WHICH, keep=st.booleans())
    def leaves_a_savepoint(self, who: int, which: int, keep: bool) -> None:
        """Release the innermost savepoint, or roll it back."""
        ready = self._ready(who, which)
        if ready is None or not ready[1].savepoints:
            return
        player, sut = ready
        opened = sut.opened
        if keep and (self._failed(sut) or opened.pending):
            return
        savepoint = sut.savepoints.pop()

        def release() -> Any:
            return savepoint.commit() if keep else savepoint.rollback()

        assert self.act(player, release, sut) is None
        level, failure = opened.levels.pop(), opened.failures.pop()
        if keep:
            opened.levels[-1] += level
        else:
            opened.pending = 0
        opened.inactive = False
        if failure is not None and failure.used_again:
            opened.failures[-1] = opened.failures[-1] or failure

    # Ends

    @rule(who=WHO, which=WHICH)
    def commits(self, who: int, which: int) -> None:
        """Commit, which flushes."""
        ready = self._ready(who, which)
        if ready is None or ready[1].life.transaction is None:
            return
        player, sut = ready
        opened = sut.opened
        if (opened.pending and self.locked(sut)) or (self._failed(sut) and (sut.savepoints or opened.pending)):
            return
        rows = [each.id for each in sut.real.new]

        def commit() -> Any:
            return sut.real.commit()

        raised = self.act(player, commit, sut)
        if opened.inactive:
            assert isinstance(raised, PendingRollbackError)
            self.oracle.executed(sut.life, self.work(player), player.actor)
            return
        assert raised is None
        if rows:
            self.oracle.executed(sut.life, self.work(player), player.actor)
            opened.pending = 0
            self._wrote(sut, *rows)
        self._over(sut, "committed")
        if opened.failure is None:
            assert all(self.stage.is_there(row) for row in opened.rows)

    @rule(who=WHO, which=WHICH)
    def rolls_back(self, who: int, which: int) -> None:
        """Roll back."""
        if not self.suts:
            return
        player, sut = self.player(who), self.sut(which)
        if sut.life.transaction is None:
            return

        def rollback() -> Any:
            return sut.real.rollback()

        assert self.act(player, rollback, sut) is None
        sut.opened.explicit = True
        self._over(sut, "rolled_back")

    def _over(self, sut: Sut, outcome: str, *, excused: bool = False) -> None:
        sut.savepoints.clear()
        self.oracle.ended(sut.life, outcome, excused=excused)

    def _outcome_of_close(self, sut: Sut) -> str:
        opened = sut.opened
        if opened.inactive and len(opened.levels) == 1:
            return "rolled_back"
        lost = opened.rows and not sut.life.autocommit
        return "closed_uncommitted" if lost else "closed"

    @rule(who=WHO, which=WHICH, how=st.sampled_from(["close", "close", "reset", "invalidate"]))
    def closes(self, who: int, which: int, how: str) -> None:
        """Close, reset or invalidate."""
        if self.suts:
            self._close(self.player(who), self.sut(which), how)

    def _close(self, player: Player, sut: Sut, how: str) -> None:
        outcome = "" if sut.life.transaction is None else self._outcome_of_close(sut)

        def close() -> Any:
            return getattr(sut.real, how)()

        assert self.act(player, close, sut) is None
        if outcome:
            self._over(sut, outcome)
        self.oracle.closed(sut.life, self.work(player))

    @rule(who=WHO, which=WHICH, well=st.booleans())
    def leaves_its_block(self, who: int, which: int, well: bool) -> None:
        """Leave the session's own ``with`` block, by an exception or not."""
        ready = self._ready(who, which)
        if ready is None:
            return
        player, sut = ready
        outcome = "" if sut.life.transaction is None else self._outcome_of_close(sut)
        leave = getattr(sut.real, "__aexit__", None) or sut.real.__exit__

        async def left() -> None:
            try:
                if not well:
                    raise LeftByError
            except LeftByError as error:
                await settled(leave(LeftByError, error, error.__traceback__))
            else:
                await settled(leave(None, None, None))

        def leaves() -> Any:
            return left()

        assert self.act(player, leaves, sut) is None
        if outcome:
            self._over(sut, outcome, excused=not well)
        self.oracle.closed(sut.life, self.work(player))

    @rule(which=WHICH)
    def is_dropped(self, which: int) -> None:
        """Drop a session, and let the collector take it."""
        if not self.suts:
            return
        sut = self.sut(which)
        self.suts.remove(sut)
        sut.savepoints.clear()
        sut.real = None
        self._collect()
        if sut.life.transaction is not None:
            self.oracle.ended(sut.life, "collected")

    def _collect(self) -> None:
        async def turn() -> None:
            gc.collect()
            await asyncio.sleep(0)

        self._do(turn())

    # Connections without a session

    @precondition(lambda self: len(self.raws) < RAWS)
    @rule(who=WHO, engine=st.sampled_from(["one", "other"]))
    def connects(self, who: int, engine: str) -> None:
        """Take a connection."""
        player = self.player(who)
        made: list[Any] = []

        async def take() -> None:
            made.append(await settled(self.stage.engines[engine].connect()))

        def connect() -> Any:
            return take()

        work = self.work(player)
        self.act(player, connect)
        self.raws.append((made.pop(), self.oracle.taken(engine, work, player.actor)))

    @rule(who=WHO, which=WHICH, how=st.sampled_from(["closed", "closed", "used", "dropped"]))
    def uses_a_connection(self, who: int, which: int, how: str) -> None:
        """Use it, give it back, or drop it."""
        if not self.raws:
            return
        player, (real, raw) = self.player(who), self.raws[which % len(self.raws)]
        if how == "used":

            def use() -> Any:
                return real.execute(text("SELECT 1"))

            self.act(player, use)
        elif how == "closed":
            self._give_back(player, real, raw)
        else:
            self.raws.remove((real, raw))
            real = None
            self._collect()
            self.oracle.returned(raw, collected=True)

    def _give_back(self, player: Player, real: Any, raw: Raw) -> None:
        def give_back() -> Any:
            return real.close()

        self.act(player, give_back)
        self.raws.remove((real, raw))
        self.oracle.returned(raw)

    # Comparing

    @invariant()
    def findings_are_those_of_the_oracle(self) -> None:
        """Each expected finding is there, and no other."""
        found = Counter((f.rule, f.work) for f in self.watch.findings() if f.severity is not Severity.ADVICE)
        assert found == self.oracle.findings

    @invariant()
    def what_is_out_is_what_the_pools_say(self) -> None:
        """Every pool's used connections are those that the pool itself has out, and the oracle's."""
        out = self.stage.out()
        assert len(self.watch.live()) == sum(out.values())
        held = [each.life.engine for each in self.suts if each.life.transaction and each.life.transaction.holds]
        assert Counter([*held, *(raw.engine for _, raw in self.raws)]) == Counter({k: v for k, v in out.items() if v})

    def counted(self, name: str, *labels: str) -> Counter[Any]:
        """A counter's values by these labels."""
        found: Counter[Any] = Counter()
        for family in self.watch.registry.collect():
            for sample in family.samples:
                if sample.name == f"session_watch_{name}" and sample.value:
                    key = tuple(sample.labels[label] for label in labels)
                    found[key if len(key) > 1 else key[0]] += int(sample.value)
        return found

    def teardown(self) -> None:
        """End all works and tasks, then give everything back; the counts are the oracle's."""
        try:
            for player in tuple(self.players):
                while player.stack:
                    self._leave(player, "well")
            for player in tuple(self.players):
                self._end(player)
            self.watch.sweep(clock() + 20_000)
            self.oracle.swept()
            self.findings_are_those_of_the_oracle()
            for sut in self.suts:
                self._close(self.nobody, sut, "close")
            for real, raw in tuple(self.raws):
                self._give_back(self.nobody, real, raw)
            self.findings_are_those_of_the_oracle()
            self.what_is_out_is_what_the_pools_say()
            assert self.counted("transactions_total", "route", "outcome") == self.oracle.outcomes
            assert self.counted("connection_checkouts_total", "route") == +self.oracle.checkouts
            assert self.counted("commits_after_response_total", "route") == +self.oracle.late_commits
            assert self.faults == ERRORS.internal
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        while self.listeners:
            pool, took = self.listeners.pop()
            event.remove(pool, "checkout", took)
        for sut in self.suts:
            with suppress(Exception):
                self._do(settled(sut.real.close()))
        for real, _ in self.raws:
            with suppress(Exception):
                self._do(settled(real.close()))
        for player in (*self.players, self.nobody):
            player.actor.task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                self._do(player.actor.task)
        self.suts.clear()
        self.watching.__exit__(None, None, None)
