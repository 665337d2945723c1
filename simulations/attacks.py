"""Three attackers, and one honest comparison; each works on the real processes of a fleet.

1. Someone changes a signed payload where it is stored: a bad mirror, a broken disk.
2. Someone has stolen everything on the server's disk, its TLS key and its online signing key
   included, and answers in its place with yesterday's repository.
3. Two of three adapter keys have signed an adapter that is bad.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from aggregation import peft_layout
from aggregation.adapter import Adapter
from protos.signed import payload_path
from simulations.demo_result import Attack
from simulations.processes import wait_for
from simulations.scenario import Scenario

if TYPE_CHECKING:
    from simulations.demo import Demo
    from simulations.fleet import Fleet


def tampered_payload(demo: Demo, adapter: Adapter) -> Attack:
    """Publish an honest release, then change one bit of its payload on the server's disk."""
    release = _publish(demo, _scaled(adapter, 1.01), "tampered")
    stored = payload_path(str(release["target"]), str(release["sha256"]))
    path = demo.fleet.server_home / "repository" / stored
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    demo.view.note(f"attack 1: one bit of {path.name[:12]}... flipped in the server's store")
    rollout = demo.roll_out(str(release["name"]), "attack 1: tampered payload")
    return _verdict("tampered payload", demo.fleet, release, rollout, "payload-digest")


def replayed_release(demo: Demo) -> Attack:
    """Kill the server, answer in its place with a stolen copy from before release 2, come back."""
    fleet = demo.fleet
    running = _running(fleet)
    demo.view.note("attack 2: server killed; a stolen copy of it answers with yesterday's metadata")
    fleet.kill_server()
    fleet.start_server(demo.stolen, "stolen-server")
    fleet.wait_for_server(demo.stolen)

    def all_refused() -> bool | None:
        told = [_status(url) for url in fleet.endpoints().values()]
        refused = [s.get("last_reason") == "metadata-rollback" for s in told]
        return True if all(refused) else None

    wait_for("all devices to refuse the replay", all_refused, seconds=180, every=0.3)
    after = _running(fleet)
    fleet.kill_server()
    fleet.start_server()
    fleet.wait_for_server()

    def reported() -> int | None:
        with fleet.operator() as operator:
            count = 0
            for device in fleet.devices:
                told = operator.device(device.name)["reports"]
                count += any(r.get("reason") == "metadata-rollback" for r in told)
        return count if count == len(fleet.devices) else None

    count = wait_for("the reports of the replay", reported, seconds=180, every=0.5)
    return Attack(
        "replayed old release",
        refused=after == running and count == len(fleet.devices),
        reason="metadata-rollback",
        detail=f"{count} of {len(fleet.devices)} devices refused it, kept "
        f"{', '.join(sorted(set(after.values())))}, and told the real server when it was back",
    )


def bad_adapter(demo: Demo, adapter: Adapter) -> Attack:
    """Release an adapter whose answers are turned round; it is signed as it should be."""
    head = {k: -v if ".classifier." in k else v for k, v in adapter.tensors.items()}
    release = _publish(demo, Adapter(adapter.spec, head), "bad")
    demo.view.note("attack 3: a correctly signed adapter with its classifier turned round")
    rollout = demo.roll_out(str(release["name"]), "attack 3: bad adapter")
    return _verdict("correctly signed, but bad", demo.fleet, release, rollout, "quality-regressed")


def compare_with_peft(fleet: Fleet, folder: Path, scenario: Scenario) -> float:
    """Largest difference between logits from PEFT's own loader and those that the devices serve.

    Args:
        fleet: all of its devices serve the adapter of ``folder``.
        folder: the adapter in PEFT layout.
        scenario: names the base, and how many tokens are read.
    """
    import peft
    import torch

    from clients.model import build, find_base, tokenizer

    base = find_base(scenario.base.name)
    adapter = peft_layout.read(folder)
    model = peft.PeftModel.from_pretrained(
        build(base, len(adapter.spec.labels)), str(folder)
    ).eval()
    texts = ["A masterpiece, warm and funny.", "Dull, and far too long.", "It arrived on Monday."]
    words = tokenizer(base)(
        texts,
        padding=True,
        truncation=True,
        max_length=scenario.train.max_length,
        return_tensors="pt",
    )
    with torch.inference_mode():
        expected = model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"]
        ).numpy()
    worst = 0.0
    for url in fleet.endpoints().values():
        with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as client:
            reply = client.post("/v1/classify", json={"texts": texts}).raise_for_status().json()
        served = np.array(
            [[p["logits"][label] for label in adapter.spec.labels] for p in reply["predictions"]]
        )
        worst = max(worst, float(np.abs(served - expected).max()))
    return worst


def _publish(demo: Demo, adapter: Adapter, name: str) -> dict[str, Any]:
    folder = demo.fleet.home / "attackers" / name
    peft_layout.write(folder, adapter, base_name=demo.options.scenario.base.name)
    why = "an attacker holds two of the three adapter keys"
    release = demo.fleet.release(folder, _channel(demo), name, force_worse=why)
    demo.view.note(f"{release['name']}: signed by 2 of 3 adapter keys ({name})")
    return release


def _channel(demo: Demo) -> str:
    return str(demo.releases[0]["name"]).rpartition("-")[0]


def _scaled(adapter: Adapter, factor: float) -> Adapter:
    return Adapter(adapter.spec, {key: factor * value for key, value in adapter.tensors.items()})


def _verdict(
    name: str,
    fleet: Fleet,
    release: Mapping[str, Any],
    rollout: Mapping[str, Any],
    reason: str,
) -> Attack:
    canary = [d["device_id"] for d in rollout["devices"] if d["reason"] == reason]
    loaded = [d for d in rollout["devices"] if d["running"] == release["name"]]
    # A device reports all that it does with a release, from the download on.
    with fleet.operator() as operator:
        touched = [
            device.name
            for device in fleet.devices
            if any(r["release"] == release["name"] for r in operator.device(device.name)["reports"])
        ]
    others = len(fleet.devices) - len(touched)
    refused = (
        rollout["state"] == "rolled_back" and len(canary) == 1 and touched == canary and not loaded
    )
    return Attack(
        name,
        refused,
        reason,
        f"the canary refused it, the rollout halted and rolled back; the other {others} devices "
        "never loaded it"
        if refused
        else f"rollout {rollout['state']}: {rollout['why']}",
    )


def _status(url: str) -> dict[str, Any]:
    try:
        reply = httpx.get(f"{url}/v1/status", timeout=30.0, trust_env=False)
        return dict(reply.raise_for_status().json())
    except (httpx.HTTPError, ValueError):
        return {}


def _running(fleet: Fleet) -> dict[str, str]:
    return {name: str(_status(url).get("release")) for name, url in fleet.endpoints().items()}
