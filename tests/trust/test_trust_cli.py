"""Keys and releases from the command line, with a real server behind it."""

from __future__ import annotations

import json
import os
import pty
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from federation.keys import KeyFileError, KeyFolder
from federation.provenance import evaluation
from federation.release_cli import keys as keys_app
from federation.release_cli import release as release_app
from tests.delivery.rig import ServerProcess
from tests.trust.fleet_of_one import Publisher
from tests.trust.test_release import adapter, folder
from tests.trust.test_signers import PROGRAM, vault

__all__ = ["adapter", "folder", "vault"]  # fixtures


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("AIRPEFT_KEY_PASSPHRASE", raising=False)


def run(app: Any, *words: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env=env)
    assert result.exit_code == code, result.output
    return result.output


def data(app: Any, *words: object, **more: Any) -> Any:
    return json.loads(run(app, *words, "--format", "json", **more))["data"]


def test_a_life_of_keys_and_releases(folder: Path, tmp_path: Path) -> None:
    """Found, release, rotate root and online, revoke an adapter key, revoke the release; on
    a server that runs all the while, and once on one that does not."""
    home, secret = tmp_path / "fleet", tmp_path / "secret"
    secret.write_text("correct horse\n")
    offline = home / "offline-keys"
    server = ServerProcess(home).start()
    try:
        here = ("--home", home)
        shown = data(keys_app, "show", *here)
        assert [c["circle"] for c in shown["circles"]] == ["root", "adapters", "online"]
        assert not any(f["due"] for f in shown["files"])

        made = data(
            keys_app, "init", tmp_path / "dora", "--name", "adapters-4", "--holder",
            "adapters-4=Dora, Basel", "--passphrase-file", secret,
        )  # fmt: skip
        assert made[0]["holder"] == "Dora, Basel"
        run(keys_app, "init", tmp_path / "bob", "--name", "root-4", "--no-passphrase")

        # A root key for another.
        swap = f"root-2={tmp_path / 'bob' / 'root-4.pub.json'}"
        change = tmp_path / "c1"
        dry = run(keys_app, "rotate", "--replace", swap, *here, "-o", change, "--dry-run")
        assert "drops root-2" in dry
        assert not change.exists()
        run(keys_app, "rotate", "--replace", swap, *here, "-o", change, "--why", "every year")
        assert "say --yes" in run(keys_app, "sign", change, "--key", offline / "root-1.pem", code=2)
        for key in (offline / "root-1.pem", offline / "root-2.pem"):
            run(keys_app, "sign", change, "--key", key, "--yes")
        assert "2 signatures are missing" in run(
            keys_app, "publish", change, *here, "--yes", code=1
        )
        bob = ("sign", change, "--key", tmp_path / "bob" / "root-4.pem", "--yes")
        assert "--root FILE" in run(keys_app, *bob, code=2), "a new key has signed nothing yet"
        metadata = home / "repository" / "metadata"
        roots = tuple(word for n in (1, 2, 3) for word in ("--root", tmp_path / f"{n}.root.json"))
        (tmp_path / "1.root.json").write_bytes((metadata / "1.root.json").read_bytes())
        run(keys_app, *bob, *roots[:2])
        assert data(keys_app, "show", change)["needs"][0]["signed_by"] == ["root-1", "root-2"]
        assert data(keys_app, "publish", change, *here, "--yes")["root"] == 2
        assert data(keys_app, "publish", change, *here, "--yes")["root"] == 2, "again"

        # The online key, made on the server's disk.
        change = tmp_path / "c2"
        run(keys_app, "revoke", "online", "--online", *here, "--why", "broken into", "-o", change)
        run(
            keys_app, "sign", change, "--key", offline / "root-1.pem",
            "--key", tmp_path / "bob" / "root-4.pem", "--yes",
        )  # fmt: skip
        assert data(keys_app, "publish", change, *here, "--hold", "--yes")["root"] == 3

        # An adapter key, by one with a passphrase; then a release that it signs.
        change = tmp_path / "c3"
        dora = tmp_path / "dora"
        run(
            keys_app, "revoke", "adapters-1", "--by", dora / "adapters-4.pub.json", *here,
            "--why", "lost laptop", "-o", change,
        )  # fmt: skip
        for n in (2, 3):
            (tmp_path / f"{n}.root.json").write_bytes((metadata / f"{n}.root.json").read_bytes())
        third = ("sign", change, "--key", offline / "root-3.pem", "--yes")
        assert "1/2 keys" in run(keys_app, *third, *roots[:2], code=2), "two changes were missed"
        run(keys_app, *third, *roots)
        for key in (offline / "root-1.pem", offline / "adapters-2.pem"):
            run(keys_app, "sign", change, "--key", key, "--yes")
        assert "needs a passphrase" in run(
            keys_app, "sign", change, "--key", dora / "adapters-4.pem", "--yes", code=2
        )
        run(
            keys_app, "sign", change, "--key", dora / "adapters-4.pem", "--yes", *roots,
            env={"AIRPEFT_KEY_PASSPHRASE": "correct horse"},
        )  # fmt: skip
        run(keys_app, "publish", change, *here, "--yes")
        request = tmp_path / "r1"
        run(release_app, "make", folder, *here, "-o", request, "--memory-mib", "64")
        run(release_app, "sign", request, "--key", offline / "adapters-1.pem", *roots)
        run(release_app, "sign", request, "--key", offline / "adapters-2.pem")
        assert "1/2" in run(release_app, "publish", request, *here, code=1)
        key = dora / "adapters-4.pem"
        run(release_app, "sign", request, "--key", key, "--passphrase-file", secret)
        run(release_app, "publish", request, *here)

        # The gate, then a release that goes through it by force.
        worse = ("--evaluation", "heldout:0.5:400")
        assert "--force-worse" in run(
            release_app, "make", folder, *here, "-o", tmp_path / "r2", *worse, code=2
        )
        why = ("--force-worse", "forgets a leaked name")
        run(
            release_app,
            "make",
            folder,
            *here,
            "-o",
            tmp_path / "r2",
            *worse,
            *why,
            "--dtype",
            "f32",
        )
        for key in (offline / "adapters-2.pem", offline / "adapters-3.pem"):
            text = run(release_app, "sign", tmp_path / "r2", "--key", key, *roots)
            assert "released because: forgets a leaked name" in text
        run(release_app, "publish", tmp_path / "r2", *here)
        assert data(release_app, "show", "stable-2", *here)["forced"] == "forgets a leaked name"

        # It was a bad idea.
        bad = tmp_path / "bad"
        said = data(
            release_app, "revoke", "stable-2", "--why", "worse", "--also-older", *here, "-o", bad
        )
        assert said["floors"] == {"stable": 3}
        for key in (offline / "adapters-2.pem", offline / "adapters-3.pem"):
            run(release_app, "sign", bad, "--key", key)
        assert "adapters-2, adapters-3" in run(release_app, "show", bad)
        run(release_app, "publish", bad, *here)
        listed = {r["release"]: r["revoked"] for r in data(release_app, "list", *here)}
        assert listed == {"stable-1": "", "stable-2": "worse"}
        with server.operator() as operator:
            lines = [(line["who"], line["action"], line["why"]) for line in operator.audit()]
            with pytest.raises(Exception, match="is revoked"):
                operator.start_rollout("stable-2")
        assert ("admin", "change keys", "lost laptop") in lines
        assert ("admin", "revoke release", "worse") in lines
    finally:
        server.stop()

    # Down: the repository is changed in place, and the next start goes on with it.
    change = tmp_path / "c4"
    run(keys_app, "renew", *here, "-o", change)
    keys = (offline / "root-1.pem", offline / "root-3.pem", offline / "adapters-2.pem")
    for key in (*keys, offline / "adapters-3.pem"):
        run(keys_app, "sign", change, "--key", key, "--yes", *roots)
    assert data(keys_app, "publish", change, *here, "--yes")["root"] == 5
    root = tmp_path / "root.json"
    root.write_bytes((home / "repository" / "metadata" / "1.root.json").read_bytes())
    report = data(release_app, "verify", home / "repository", "--root", root)
    assert report["sound"]
    rows = {row["release"]: row for row in report["releases"]}
    assert rows["stable-2"]["revoked"] == "worse"
    assert rows["stable-2"]["signed_by"] == ["adapters-2", "adapters-3"]
    assert rows["stable-2"]["forced"] == "forgets a leaked name"
    table = run(release_app, "verify", home / "repository", "--root", root)
    assert "REVOKED: worse" in table
    try:
        server.start()
        assert data(keys_app, "show", *here)["circles"][-1]["keys"][0]["name"] == "online-2"
    finally:
        server.stop()


def test_a_key_behind_a_command(
    publisher: Publisher, folder: Path, vault: Path, tmp_path: Path
) -> None:
    words = [sys.executable, str(vault / "sign.py"), str(vault / "ecdsa.pem")]
    uri = f"command:{shlex.join(words)}"
    noted = data(
        keys_app, "import", tmp_path / "k", "adapters-9", "--uri", uri,
        "--public", vault / "ecdsa.pub.pem", "--holder", "HSM room",
    )  # fmt: skip
    assert (noted[0]["signs_by"], noted[0]["holder"]) == ("uri", "HSM room")
    assert "public half" in run(
        keys_app, "import", tmp_path / "k", "adapters-8", "--uri", uri,
        "--public", vault / "ed25519.pub.pem", code=2,
    )  # fmt: skip
    assert not (tmp_path / "k" / "adapters-8.uri").exists()
    assert "--public" in run(keys_app, "import", tmp_path / "k", "adapters-7", "--uri", uri, code=2)
    assert "airpeft[pkcs11]" in run(
        keys_app, "import", tmp_path / "k", "adapters-7", "--uri", "pkcs11:id=%02", code=2
    )
    request = tmp_path / "r1"
    run(release_app, "make", folder, "--repository", publisher.repository.folder, "-o", request)
    root = tmp_path / "root.json"
    root.write_bytes(publisher.repository.root())
    signs = ("sign", request, "--root", root, "--key")
    run(release_app, *signs, tmp_path / "k" / "adapters-9.uri")
    public = tmp_path / "k" / "adapters-9.pub.json"
    run(release_app, *signs, uri, "--public", public)
    assert "needs one --public" in run(release_app, "sign", request, "--key", uri, code=2)
    assert data(release_app, "show", request)["signed_by"] == ["adapters-9"]
    assert PROGRAM


def test_what_is_due(publisher: Publisher, tmp_path: Path) -> None:
    """By the machine's clock, everything that this publisher signed has long expired."""
    shown = data(keys_app, "show", "--repository", publisher.repository.folder)
    due = {one["role"]: one["due"] for one in shown["files"]}
    assert "EXPIRED" in due["timestamp"]
    assert {row["role"] for row in shown["files"]} >= {"root", "targets", "adapters"}
    text = run(keys_app, "show", "--repository", publisher.repository.folder)
    assert "2 of 3" in text


def test_mistakes_in_a_change(publisher: Publisher, tmp_path: Path) -> None:
    here, out = ("--repository", publisher.repository.folder), tmp_path / "c"
    public = publisher.keys.path / "root-1.pub.json"
    for words, message in (
        (("rotate",), "nothing changes"),
        (("rotate", "--replace", "root-1"), "is not of the form"),
        (("rotate", "--add", f"nobody={public}"), "no circle"),
        (("rotate", "--drop", "carol"), "no key is called"),
        (("rotate", "--threshold", "root=x"), "CIRCLE=N"),
        (("rotate", "--online"), "with --home"),
        (("revoke", "root-1", "--why", "x", "--by", public, "--by", public), "2 times"),
        (("revoke", "online", "--why", "x"), "add keys"),
        (("delegate", "adapters-x", "--channel", "stable*", "--key", public), "of its own"),
        (("delegate", "x", "--channel", "x", "--key", public), "adapters-NAME"),
    ):
        text = run(keys_app, *words, *here, "-o", out, code=2)
        assert message in text, words
    assert not out.exists()
    assert "which server" in run(keys_app, "show", code=2)
    for words in (("init", tmp_path / "k", "--name", "a", "--holder", "b=c", "--no-passphrase"),):
        assert "NAME=PERSON" in run(keys_app, *words, code=2)


def test_a_role_for_a_tenant(publisher: Publisher, tmp_path: Path) -> None:
    here, out = ("--repository", publisher.repository.folder), tmp_path / "c"
    names = ("acme-1", "acme-2", "acme-3")
    made = [word for name in names for word in ("--name", name)]
    run(keys_app, "init", tmp_path / "acme", *made, "--no-passphrase")
    keys = [word for n in names for word in ("--key", tmp_path / "acme" / f"{n}.pub.json")]
    words = ("delegate", "adapters-acme", "--channel", "acme-*", *keys, *here, "-o", out)
    assert "adapters-acme: new, 2 of acme-1" in run(keys_app, *words, "--dry-run")
    needs = data(keys_app, *words)["needs"]
    assert [need["file"] for need in needs] == ["targets.json", "adapters-acme.json"]


@pytest.mark.parametrize("second", ["correct horse", "battery staple"])
def test_a_passphrase_by_prompt(tmp_path: Path, second: str) -> None:
    """Asked for twice, on the terminal and not shown; a real terminal, as far as the child sees."""
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover  # another process
        try:
            words = ["keys", "init", str(tmp_path / "k"), "--name", "adapters-4"]
            os.execv(sys.executable, [sys.executable, "-m", "airpeft", *words])  # noqa: S606
        finally:
            os._exit(127)
    shown = b""
    answers = [b"correct horse\n", f"{second}\n".encode(), b"x\n", b"x\n"]
    while True:
        try:
            shown += os.read(terminal, 4_096)
        except OSError:  # the child has closed its side
            break
        if shown.count(b": ") and shown.endswith(b": ") and answers:
            os.write(terminal, answers.pop(0))
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.WEXITSTATUS(status) == 0, shown
    assert b"correct horse" not in shown
    key = KeyFolder(tmp_path / "k")
    assert key.signer("adapters-4", "correct horse" if second == "correct horse" else "x")
    with pytest.raises(KeyFileError, match="passphrase"):
        key.signer("adapters-4", "another")


def test_words_of_others_do_nothing_to_a_terminal(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    """Who decides whether to sign must see the reason, and not what it makes of the screen."""
    publisher.release(1, evaluation=evaluation("heldout", 0.99, 400))
    copy = ("--repository", publisher.repository.folder)
    hostile = "leaks\x1b[1A\x1b[2K\rbetter than stable-1\u202e\nstable-2: fine"
    written = r"leaks\x1b[1A\x1b[2K\rbetter than stable-1\u202e\nstable-2: fine"
    request = tmp_path / "r"
    texts = [run(release_app, "make", folder, *copy, "-o", request, "--force-worse", hostile)]
    key = publisher.keys.path / "adapters-1.pem"
    texts.append(run(release_app, "sign", request, "--key", key))
    texts.append(run(release_app, "show", request))
    bad = tmp_path / "bad"
    texts.append(
        run(release_app, "revoke", "stable-1", "--why", hostile, "--also-older", *copy, "-o", bad)
    )
    signing = run(release_app, "sign", bad, "--key", key)
    assert "floor of stable  2" in signing, "a signer is shown all that is said"
    change = tmp_path / "change"
    texts += [signing, run(keys_app, "renew", "--why", hostile, *copy, "-o", change)]
    for text in texts:
        assert written in text
        assert not set(text) & set("\x1b\r\u202e")
    # Nor does a passphrase's file show what is in it.
    binary = tmp_path / "binary"
    binary.write_bytes(b"secret\xff\n")
    text = run(keys_app, "init", tmp_path / "k", "--passphrase-file", binary, code=2)
    assert "not text" in text
    assert "secret" not in text


def test_a_token_is_not_sent_where_anybody_could_read_it(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret-token\n")
    for url in ("http://fleet.example.org:8443", "fleet.example.org", "http://127.0.0.1@evil.org"):
        said = run(release_app, "list", "--url", url, "--token-file", token, code=1)
        assert "for anybody to read" in said
        assert "secret-token" not in said
