"""Several gateways on one PostgreSQL: they share a rollout, one is killed, nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from aggregation.durable import StorageError
from federation import postgres, server_cli, tables, turns
from federation.client import OperatorClient, OperatorError
from federation.folder_lock import FolderLock
from federation.moving import MovingError, check_not_moved, move_in
from federation.postgres import DatabaseAwayError, DatabaseError
from federation.repository import Repository
from federation.rollout import State
from federation.store import Store
from protos.messages import DeviceEvent
from protos.signed import RoundDocument
from tests.delivery import test_ticker
from tests.delivery.postgres import Database, GatewayProcess, binaries, gateway, url_of
from tests.delivery.rig import Device, Obedient, Watcher, enrol, new_key, request_for
from tests.delivery.test_ticker import House
from tests.waiting import until

PROGRAMS = binaries()
needs_postgres = pytest.mark.skipif(
    PROGRAMS is None, reason="PostgreSQL is not installed (initdb and postgres by pg_config)"
)


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    assert PROGRAMS is not None
    made = Database(PROGRAMS)
    try:
        made.start()
        yield made
    finally:
        made.remove()


Pair = tuple[GatewayProcess, GatewayProcess]


@pytest.fixture(scope="module")
def pair(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    address, home = database.new(), tmp_path_factory.mktemp("pair") / "home"
    west, east = gateway(home, "west", address).start(), gateway(home, "east", address).start()
    yield west, east
    assert (west.stop(), east.stop()) == (0, 0), west.log() + east.log()
    assert "Traceback" not in west.log() + east.log()


@dataclass
class Either:
    """Two gateways as a device knows them: one name with two addresses, asked in order."""

    first: GatewayProcess
    second: GatewayProcess

    @property
    def endpoints(self) -> dict[str, Any]:
        both = ",".join(one.endpoints["fleet"] for one in (self.first, self.second))
        return {"fleet": f"ipv4:{both}"}

    def operator(self) -> OperatorClient:
        return self.first.operator()


class Steady(Obedient):
    """Delivers each report until it is acknowledged, the very same one, as devices do."""

    def _say(self, event: DeviceEvent, document: RoundDocument, name: str) -> bool:
        key = (document.sequence, name)
        if key not in self.signed:
            self.signed[key] = self.device.signed(event, release=name, rollout=document.rollout)
        try:
            return self.device.send([self.signed[key]]) >= self.device.sequence
        except grpc.RpcError:
            return False

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.signed: dict[tuple[int, str], Any] = {}


@needs_postgres
def test_two_gateways_share_a_rollout_and_one_is_killed(pair: Pair) -> None:
    west, east = pair if pair[0].decides() else pair[::-1]
    assert (west.decides(), east.decides()) == (True, False)
    with west.operator() as operator:
        for known in operator.devices():  # of other tests: no wave shall wait for them
            operator.revoke(known["id"], "away")
    sides = (Either(west, east), Either(east, west))
    devices = [Device(sides[n % 2], f"d-{n}") for n in range(6)]  # type: ignore[arg-type]
    fleet = [Steady(device) for device in devices]
    name = west.publish(1, b"payload" * 1000)
    for one in fleet:
        one.watcher.__enter__()
    try:
        until(lambda: all(one.watcher.bundles for one in fleet), what="six open streams")
        with east.operator() as operator:
            until(
                lambda: sum(d["connected"] for d in operator.devices()) == 6, what="all are known"
            )
            policy = {"bake_seconds": 0.2, "deadline_seconds": 600.0}
            rollout = operator.start_rollout(name, ["1", "3", "100%"], policy=policy)["id"]
        until(lambda: any(one.loaded for one in fleet), what="the canary's commit")
        west.kill()  # the one that decides
        until(east.decides, what="the other one decides")
        with east.operator() as operator:
            until(lambda: operator.rollout(rollout)["state"] == "done", what="done")
            told = operator.rollout(rollout)["devices"]
            assert {d["outcome"] for d in told} == {"committed"}
            assert {d["attempts"] for d in told} == {0}
        until(lambda: [one.loaded for one in fleet] == [[name]] * 6, what="each has it once")
        west.start()
        assert not west.decides()
        second = east.publish(2, b"other" * 1000)
        with west.operator() as operator:  # known here, though published there
            rollout = until(
                lambda: (
                    second in {one["name"] for one in operator.releases()}
                    and operator.start_rollout(second, ["100%"])["id"]
                ),
                what="the release at the other gateway",
            )
            until(lambda: operator.rollout(rollout)["state"] == "done", what="done")
            verdict = operator.verify_audit()
            assert verdict["sound"], verdict
        until(lambda: [one.loaded for one in fleet] == [[name, second]] * 6, what="both, once")
    finally:
        for one in fleet:
            one.watcher.__exit__()
    check_reports(west.address, fleet)


def check_reports(address: str, fleet: list[Steady]) -> None:
    """Each report that was signed is there once, and byte for byte."""
    store = Store.connect(url_of(address), "reader")
    query = sa.select(tables.reports.c.device_id, tables.reports.c.body)
    query = query.where(tables.reports.c.device_id.in_([one.device.name for one in fleet]))
    with store.read() as connection:
        stored = sorted((row.device_id, bytes(row.body)) for row in connection.execute(query))
    store.close()
    signed = [(one.device.name, r.body) for one in fleet for r in one.signed.values()]
    assert stored == sorted(signed)


@needs_postgres
def test_what_one_gateway_admits_or_revokes_holds_at_the_other(
    pair: Pair,
) -> None:
    west, east = pair
    device = Device(west)
    device.server = east  # at once: its certificate was issued a moment ago, elsewhere
    with Watcher(device) as watcher, west.operator() as operator:
        until(lambda: watcher.bundles, what="the stream at the other gateway")
        assert watcher.ended is None
        until(lambda: operator.device(device.name)["connected"], what="known at the first one")
        seen = len(watcher.bundles)
        west.publish(1, b"pushed across", channel="across")
        until(lambda: len(watcher.bundles) > seen, what="the other gateway's push")
        operator.revoke(device.name, "stolen")
        denied = grpc.StatusCode.PERMISSION_DENIED
        until(
            lambda: watcher.ended and watcher.ended.code() is denied,  # type: ignore[attr-defined]
            what="the end of the stream",
        )
    with pytest.raises(grpc.RpcError, match="was revoked"):
        device.report(DeviceEvent.HEALTH)


@needs_postgres
def test_a_token_is_used_once_at_whichever_gateway(
    pair: Pair,
) -> None:
    west, east = pair
    with west.operator() as operator:
        here, there = operator.make_token(), operator.make_token()
        there = {**there, "enrol": east.endpoints["enrol"], "token": here["token"]}
    start = threading.Barrier(6)

    def use(endpoints: dict[str, Any]) -> str:
        request = request_for(new_key())
        start.wait(120)
        try:
            return enrol(endpoints, endpoints["token"], request).device_id
        except grpc.RpcError as error:
            return str(error.details())

    with ThreadPoolExecutor(6) as pool:
        answers = sorted(pool.map(use, [here, there] * 3))
    assert sum("used-token" in answer for answer in answers) == 5, answers
    with east.operator() as operator:
        assert operator.verify_audit()["sound"]


@needs_postgres
def test_the_database_goes_away_and_comes_back(database: Database, pair: Pair) -> None:
    west, east = pair
    device = Device(east)
    name = west.publish(1, b"payload" * 100, channel="away")
    with Watcher(device) as watcher, east.operator() as operator:
        until(lambda: watcher.bundles, what="the stream")
        record = until(
            lambda: next((r for r in operator.releases() if r["name"] == name), None),
            what="the release at the other gateway",
        )
        folder, _, file = record["target"].rpartition("/")
        report = device.signed(DeviceEvent.HEALTH)
        database.stop()
        try:
            until(lambda: operator.health()["trouble"], what="the trouble is told")
            with pytest.raises(grpc.RpcError) as refused:
                device.send([report])
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(OperatorError, match="cannot read the database") as away:
                operator.releases()
            assert away.value.status == 503
            path = f"targets/{folder}/{record['sha256']}.{file}"
            assert device.fetch(path) == b"payload" * 100
            beats = watcher.heartbeats
            until(lambda: watcher.heartbeats > beats, what="the stream goes on")
            assert watcher.ended is None
        finally:
            database.start()
        until(lambda: not operator.health()["trouble"], what="it answers again")
        assert device.send([report]) == 1
        assert until(lambda: west.decides() or east.decides(), what="one that decides")


# --- the same invariants on both kinds of database ------------------------------------------------


@pytest.fixture
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """On PostgreSQL, unless a test asks for more by :data:`on_both`."""
    kind = getattr(request, "param", "postgres")
    url = url_of(request.getfixturevalue("database").new()) if kind == "postgres" else None
    made = House(tmp_path, database=url)
    yield made
    made.store.close()


on_both = pytest.mark.parametrize(
    "house", ["sqlite", pytest.param("postgres", marks=needs_postgres)], indirect=True
)


def beside(house: House, name: str) -> Store:
    """The same database as another process opens it."""
    if house.database is None:
        return Store.open(house.home / "fleet.sqlite", house.store.clock)
    return Store.connect(house.database, name, house.store.clock)


@on_both
def test_many_writers_never_fork_the_audit_log(house: House) -> None:
    stores = [beside(house, f"g-{number}") for number in range(2)]

    def write(number: int) -> None:
        store = stores[number % 2]
        for line in range(8):
            with store.write() as connection:
                store.log(connection, f"g-{number}", "test", "x\0y" * 100, f"line {line}")

    before = house.store.verify_audit().lines
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    verdict = house.store.verify_audit()
    assert (verdict.sound, verdict.lines) == (True, before + 32)
    for store in stores:
        store.close()


@needs_postgres
@pytest.mark.parametrize("change", ["UPDATE audit SET why = 'nothing'", "DELETE FROM audit"])
def test_the_audit_log_only_grows(house: House, change: str) -> None:
    with house.store.write() as connection:
        house.store.log(connection, "ann", "test", "x", "y")
    with (
        pytest.raises(sa.exc.IntegrityError, match="only grows"),
        house.store.write() as connection,
    ):
        connection.exec_driver_sql(change)
    assert house.store.audit()[0]["why"] == "y"


@on_both
def test_a_decision_that_was_overtaken_is_not_written(house: House) -> None:
    seen = turns.turn(house.store)
    other = beside(house, "other")
    with other.write() as connection:
        turns.take(connection, seen)
    with pytest.raises(turns.OvertakenError, match="try again"), house.store.write() as connection:
        turns.take(connection, seen)
    tried: list[int] = []

    def attempt(turn: int) -> int:
        tried.append(turn)
        if len(tried) < 3:
            raise turns.OvertakenError
        return turn

    assert turns.settled(house.store, attempt) == seen + 1
    other.close()


@needs_postgres
def test_a_report_of_a_foreign_rollout_is_kept_whatever_its_length(house: House) -> None:
    house.enrol("d-a")
    house.say("d-a", DeviceEvent.COMMITTED, release="x" * 200, rollout="r" * 200)
    assert house.fleet.device("d-a")["reports"][0]["rollout"] == "r" * 200


@needs_postgres
def test_waves_and_tables_are_as_with_sqlite(house: House) -> None:
    test_ticker.test_a_rollout_goes_through_its_waves_and_everything_is_audited(house)
    test_ticker.test_the_migrations_make_the_tables_that_the_code_uses(house)


# --- what is refused ------------------------------------------------------------------------------


def refused(*words: str, **environment: str) -> str:
    result = CliRunner().invoke(cli_app(), [*words], env=environment)
    assert result.exit_code == 2, result.output
    return str(result.stderr)


def cli_app() -> Any:
    import typer

    app = typer.Typer()
    app.command()(server_cli.server)
    return app


def test_what_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = ("--home", str(tmp_path / "home"))
    secret = "postgresql+psycopg://fleet:sesame@db/airpeft"
    for address in (secret, "postgresql://fleet@db/airpeft?password=sesame"):
        text = refused(*home, "--database", address)
        assert "AIRPEFT_DATABASE_PASSWORD" in text
        assert "sesame" not in text
    assert "allowed is postgresql+psycopg://" in refused(*home, "--database", "mysql://u@h/n")
    assert "names no database" in refused(*home, "--database", "postgresql://fleet@db")
    assert "is no address" in refused(*home, "--database", "nonsense")
    missing = ("--database-password-file", str(tmp_path / "none"))
    assert "database's password" in refused(*home, *missing, "--database", "postgresql://u@h/n")
    assert "--gateway needs --database" in refused(*home, "--gateway", "west")
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    text = refused(*home, AIRPEFT_DATABASE=secret)
    assert "pip install 'airpeft[postgres]'" in text
    monkeypatch.undo()
    nobody = f"postgresql+psycopg://fleet:sesame@/airpeft?host={tmp_path}"
    text = refused(*home, AIRPEFT_DATABASE=nobody)
    assert "check that PostgreSQL runs there" in text
    assert "sesame" not in text


@needs_postgres
def test_a_gateway_that_does_not_belong_is_refused(pair: Pair, tmp_path: Path) -> None:
    west, _ = pair
    address = west.address
    same = ("--home", str(west.home), "--database", address)
    assert "a gateway named 'west' runs in" in refused(*same, "--gateway", "west")
    assert "another server" in refused(*same)
    killed = west.home / "gateways" / "aaa" / "endpoints.json"
    killed.parent.mkdir()
    killed.write_text('{"api": "127.0.0.1:9"}')
    with OperatorClient.of_home(west.home) as operator:
        assert operator.health()["gateway"] in ("east", "west")
    killed.unlink()
    other = ("--home", str(tmp_path / "other"), "--database", address, "--gateway", "north")
    assert "belongs to a fleet with the authority" in refused(*other)
    assert "lower-case letters" in refused(*same, "--gateway", "../up")


def test_a_password_is_not_shown() -> None:
    url = postgres.read_address("postgresql://fleet@db/airpeft?password=x", "sesame")
    assert url.password == "sesame"
    assert postgres.shown(url) == "postgresql+psycopg://fleet:***@db/airpeft"
    with pytest.raises(DatabaseError, match="is no address"):
        postgres.read_address("://")


@needs_postgres
def test_a_fleet_moves_from_sqlite_with_all_that_it_knows(
    database: Database, tmp_path: Path
) -> None:
    house = House(tmp_path)
    house.enrol("d-a", "d-b")
    rollout = test_ticker.roll_out(house, house.publish(1))
    house.obey(rollout)
    before, audit = house.fleet.devices(), house.store.verify_audit()
    house.store.close()
    house.database = url_of(database.new())
    check_not_moved(tmp_path)
    store = Store.connect(house.database)
    move_in(store, tmp_path)
    (tmp_path / "fleet.sqlite.moved").rename(tmp_path / "fleet.sqlite")  # killed before the rename
    move_in(store, tmp_path)
    with pytest.raises(MovingError, match="start it with --database"):
        check_not_moved(tmp_path)
    store.close()
    house.start_again()
    assert house.fleet.devices() == before
    assert house.store.verify_audit() == audit
    assert test_ticker.run_to_end(house, rollout) is State.DONE
    with_state = House(tmp_path / "other")
    with_state.enrol("d-c")
    with pytest.raises(MovingError, match=r"both .* hold a fleet"):
        move_in(house.store, with_state.home)
    house.store.close()


@needs_postgres
def test_one_that_hangs_while_it_decides_must_give_way(database: Database) -> None:
    store = Store.connect(url_of(database.new()), "west")
    lock = (postgres.SPACE, postgres.DECIDER)

    def hang() -> None:
        with (
            postgres.session(store.engine) as other,
            postgres.session(store.engine) as hanging,
        ):
            assert hanging.takes(*lock)
            assert not other.takes(*lock)
            assert not other.ends_silent(*lock, 3600.0)
            assert until(lambda: other.ends_silent(*lock, 0.0), what="its end")
            assert until(lambda: other.takes(*lock), what="the other one's turn")
            hanging.ping()

    with pytest.raises(DatabaseAwayError, match="terminating connection"):
        hang()
    store.close()


def test_two_gateways_never_write_the_same_version(tmp_path: Path) -> None:
    house = House(tmp_path)
    writers = [Repository(house.repository.folder, house.repository._online) for _ in range(2)]
    now = datetime.now(UTC)

    def refresh(writer: Repository) -> None:
        for _ in range(5):
            writer.refresh_timestamp(now)

    before = house.repository.versions()["timestamp"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(refresh, writers))
    house.repository.refresh()
    assert house.repository.versions()["timestamp"] == before + 10
    house.publish(1)
    assert writers[1].locate(house.repository.release("stable-1").path).is_file()
    house.store.close()


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    first = FolderLock(tmp_path / "lock")
    second = FolderLock(tmp_path / "lock", patience=0.05)
    with first.held() as outermost, first.held() as again:
        assert (outermost, again) == (True, False)
        with pytest.raises(StorageError, match="held by another process"), second.held():
            pass
    with second.held() as outermost:
        assert outermost
