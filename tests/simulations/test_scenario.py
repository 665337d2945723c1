from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.scenario import ScenarioError, keys, load, parse

SCENARIOS = Path("scenarios")


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_scenarios_load_and_survive_being_written_out(path: Path, tmp_path: Path) -> None:
    scenario = load(path)
    written = tmp_path / "again.toml"
    written.write_text(scenario.to_toml())
    assert load(written) == scenario
    assert load(written).digest == scenario.digest


def test_overrides_and_seed_win_over_the_file() -> None:
    scenario = load(
        SCENARIOS / "quick.toml",
        overrides=["train.rank=2", "privacy.epsilon=3", 'partition.scheme="iid"', "name=other"],
        seed=99,
    )
    assert scenario.train.rank == 2
    assert scenario.privacy is not None
    assert scenario.privacy.epsilon == 3.0
    assert scenario.partition.scheme == "iid"
    assert (scenario.name, scenario.seed) == ("other", 99)
    assert scenario.digest != load(SCENARIOS / "quick.toml").digest


def test_pieces_ranks_and_the_trusted_client_are_read_and_survive_being_written_out(
    tmp_path: Path,
) -> None:
    pieces = ["federation.pieces.codec=int8(block=32)", 'federation.pieces.weigh="uniform"']
    scenario = load(
        SCENARIOS / "quick.toml",
        overrides=[*pieces, "train.ranks=[2, 8]", "federation.recipe=fltrust",
                   "federation.trusted=3"],
    )  # fmt: skip
    assert (scenario.train.rank, scenario.train.ranks) == (8, (2, 8))
    assert scenario.ranks == {f"client-{i:05d}": (2, 8)[i % 2] for i in range(5)}
    assert scenario.trusted == "client-00003"
    chosen = scenario.federation.chosen()
    assert (str(chosen.codec), str(chosen.weigh), chosen.reduce.kind) == (
        "int8(block=32)",
        "uniform",
        "fltrust",
    )
    written = tmp_path / "again.toml"
    written.write_text(scenario.to_toml())
    assert load(written) == scenario
    assert load(written).digest == scenario.digest != load(SCENARIOS / "quick.toml").digest


def test_scenarios_that_use_nothing_new_have_the_digest_that_they_always_had() -> None:
    runs = {path.stem: load(path).run for path in SCENARIOS.glob("*.toml")}
    assert runs["quick"] == "quick-7d344535704a"
    assert runs["demo"] == "demo-4be59546b697"


def test_a_rank_on_the_command_line_takes_the_place_of_ranks_and_the_other_way_round() -> None:
    path = SCENARIOS / "quick.toml"
    mixed = load(path, overrides=["train.ranks=[2, 8]"])  # the file says rank = 4
    assert mixed.train.rank == 8
    with pytest.raises(ScenarioError, match=r"rank = 4 contradicts ranks = \[2, 8\]"):
        load(path, overrides=["train.ranks=[2, 8]", "train.rank=4"])


def test_several_ranks_need_a_recipe_that_takes_them() -> None:
    mixed = {"name": "x", "train": {"ranks": [2, 4]}, "federation": {"recipe": "fedit"}}
    with pytest.raises(ScenarioError, match=r"fedit needs one rank.*svd-warm-start"):
        parse(mixed)
    assert parse({**mixed, "federation": {"recipe": "flora"}}).ranks
    # One rank for all is no mixture, and clients that choose rank indices have one each.
    assert parse({**mixed, "train": {"ranks": [4, 4]}}).train.rank == 4
    assert parse({**mixed, "federation": {"recipe": "fed-plora"}}).ranks


def test_only_recipes_without_a_global_model_keep_rows_out_by_themselves() -> None:
    assert parse({"name": "x"}).holdout == 0
    personal = {"name": "x", "federation": {"recipe": "fedsa-lora"}}
    assert parse(personal).holdout == 0.2
    assert parse(personal, overrides=["train.holdout=0.0"]).holdout == 0


def test_too_few_clients_in_a_round_are_refused_for_the_share_that_is_drawn() -> None:
    scenario = {"name": "x", "federation": {"recipe": "krum"}, "partition": {"clients": 20}}
    assert parse(scenario)
    with pytest.raises(ScenarioError, match=r"krum with 4 of 20 clients in a round.*2 f \+ 3"):
        parse(scenario, overrides=["federation.fraction=0.2"])
    with pytest.raises(ScenarioError, match="krum with 4 of 20"):
        parse(scenario, overrides=["federation.fraction=0.2", "federation.sampling=poisson"])


def test_a_bare_word_needs_no_quotes_in_an_override() -> None:
    assert parse({"name": "x"}, overrides=["partition.scheme=iid"]).partition.scheme == "iid"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.rank=0", ["--set train.rank = 0", "greater than or equal to 1"]),
        ("train.rank=999", ["--set train.rank = 999", "less than or equal to 256"]),
        ("train.rank=two", ['--set train.rank = "two"', "valid integer"]),
        ("train.rnak=4", ["--set train.rnak = 4", "unknown key", "did you mean train.rank?"]),
        ("rank=4", ["--set rank = 4", "unknown key", "did you mean train.rank?"]),
        ("trian.rank=4", ["trian", "unknown key"]),
        ("partition.scheme=shards", ['= "shards"', "'iid'", "'dirichlet'", "'natural'"]),
        ("partition.scheme=natural", ["column is needed by scheme 'natural'"]),
        ("federation.recipe=fedavg", ["'fedavg'", "svd-warm-start", "fedit"]),
        ("federation.pieces.codec=int9", ["federation.pieces", "int9", "did you mean int"]),
        ("federation.pieces.codek=int8", ["no piece 'codek'", "codec"]),
        ("federation.pieces.weigh=uniform()x", ["federation.pieces", "uniform()x"]),
        ("federation.pieces.reduce=factor-mean", ["federation.pieces", "svd-warm-start", "rank"]),
        ("federation.pieces=int8", ['federation.pieces = "int8"', "dictionary"]),
        ("federation.pieces.codec.block=8", ["unknown key", "federation.pieces.codec"]),
        ("federation.recipe=fltrust", ["trusted client", "federation.trusted = 0"]),
        ("federation.trusted=0", ["trusts nobody", "fltrust"]),
        ("federation.trusted=9", ["federation.trusted = 9", "0 to 4"]),
        ("federation.trusted=mallory", ["'mallory' is no client"]),
        ("federation.buffer=2", ["buffer = 2", "svd-warm-start", "fedbuff"]),
        ("federation.max_staleness=2", ["max_staleness = 2", "fedbuff"]),
        ("federation.recipe=bulyan", ["5 of 5 clients", "bulyan", "4 f + 3"]),
        ("federation.recipe=dp-fedlora", ["dp-fedlora", "leave privacy out"]),
        ("train.ranks=[2, 0]", ["train.ranks", "greater than or equal to 1"]),
        ("train.holdout=0.95", ["--set train.holdout = 0.95", "0.9"]),
        ("federation.min_updates=50", ["federation.min_updates = 50", "partition.clients = 5"]),
        ("privacy.noise_multiplier=1.0", ["give either epsilon or noise_multiplier"]),
        ("data.heldout=1.0", ["--set data.heldout = 1.0", "less than 1"]),
        ("data.labels.x.y=1", ["unknown key"]),
        ("train.rank", ["not of the form section.key=value"]),
        ("name.rank=1", ["name is not a section"]),
    ],
)
def test_a_wrong_override_names_key_value_and_what_is_allowed(
    override: str, parts: list[str]
) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(SCENARIOS / "quick.toml", overrides=[override])
    for part in parts:
        assert part in str(caught.value)


def test_a_wrong_file_is_named_with_every_wrong_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[train]\nrank = 0\nlearning_rate = "fast"\n[patrition]\nclients = 2\n')
    with pytest.raises(ScenarioError) as caught:
        load(path)
    message = str(caught.value)
    assert message.count(str(path)) == 3
    assert "train.rank = 0" in message
    assert 'train.learning_rate = "fast"' in message
    assert "patrition" in message


def test_files_that_are_missing_or_not_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="there is no such file"):
        load(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("[train\n")
    with pytest.raises(ScenarioError, match=r"bad\.toml: not TOML"):
        load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="cannot be read"):
        load(path)
    with pytest.raises(ScenarioError, match="cannot be read"):
        load(tmp_path)


def test_the_users_own_file_is_relative_to_the_scenario(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[data]\npath = "rows.csv"\n')
    assert load(path).data.path == str(tmp_path / "rows.csv")
    assert load(path).name == "mine"
    assert load(path, overrides=["data.path=rows.csv"]).data.path == str(Path("rows.csv").resolve())


def test_no_privacy_is_no_section() -> None:
    assert parse({"name": "x"}).privacy is None
    assert parse({"name": "x"}, overrides=["privacy.epsilon=1.0"]).privacy is not None


def test_every_key_is_listed() -> None:
    assert "train.rank" in keys()
    assert "privacy.epsilon" in keys()
    assert "federation.pieces.codec" in keys()
    assert "federation.pieces" not in keys()
    assert "name" in keys()


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False)
            | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_nonsense_is_refused_in_our_words_or_is_a_scenario(document: dict[str, object]) -> None:
    try:
        scenario = parse(document)
    except ScenarioError:
        return
    assert parse(scenario.model_dump(mode="json")) == scenario
